"""Traces: of the right calls, in the right place, and never at the run's cost."""

from pathlib import Path

import jax
import pytest
from memory_bucket import memory_bucket
from small_model import tune

from isheep_jax import profiling


@pytest.fixture
def profiler(monkeypatch):
    """What JAX's profiler was told to do, in place of it: it writes a file."""
    log = []

    def start(directory):
        log.append(("start", directory))

    def stop():
        (_, directory), *_ = log
        log.append("stop")
        Path(directory, "host.xplane.pb").write_text("trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return log


def test_the_calls_after_the_warm_up_are_traced_into_the_directory(profiler, monkeypatch):
    bucket = memory_bucket(monkeypatch) / "profile"
    begun = []
    with profiling.tracing(bucket) as trace:
        for _ in range(profiling.WARM_UP + profiling.TRACED + 2):
            profiling.step()
            begun.append(len(profiler))
    # Before each call: not begun, running, ended.
    assert begun == [0] * profiling.WARM_UP + [1] * profiling.TRACED + [2] * 2
    assert trace.written
    assert (bucket / "host.xplane.pb").read_text() == "trace"
    profiling.step()
    assert len(profiler) == 2


def test_a_trace_ends_with_its_stage(profiler, tmp_path):
    with profiling.tracing(tmp_path) as trace:
        for _ in range(profiling.WARM_UP + 1):
            profiling.step()
    assert profiler[1:] == ["stop"]
    assert trace.written


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_no_error(profiler, monkeypatch, tmp_path, broken):
    def fail(*_):
        raise RuntimeError("only one profile\nat a time")

    monkeypatch.setattr(jax.profiler, broken, fail)
    with profiling.tracing(tmp_path) as trace:
        for _ in range(9):
            profiling.step()
    assert (trace.calls, trace.written, trace.error) == (9, False, "only one profile at a time")


def test_updates_of_a_fine_tuning_are_traced(tmp_path):
    with profiling.tracing(tmp_path / "profile") as trace:
        _, result = tune(tmp_path / "checkpoints")
    assert trace.written
    assert trace.calls == result.steps > profiling.WARM_UP
    (traced,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert traced.stat().st_size > 1000
