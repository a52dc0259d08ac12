"""--profile: one stage, by the name that the progress shows."""

import contextlib

import pytest

from isheep_jax import profiling
from isheep_jax.errors import UserError
from isheep_jax.runtime.stage_profile import PROFILED, StageProfiler, check_stage


class Lines:
    """A reporter that keeps the lines."""

    def __init__(self):
        self.lines = []
        self.note = self.warn = self.lines.append

    @contextlib.contextmanager
    def stage(self, iteration, name, total, unit):
        yield f"{iteration} {name}"


def run(profiler, *stages):
    """Opens stages of one device call each, and returns which of them were to be traced."""
    traced = []
    for iteration, name in stages:
        with profiler.stage(iteration, name, None, "units") as progress:
            assert progress == f"{iteration} {name}"
            if profiling._trace is not None:
                traced.append((iteration, name))
            profiling.step()
    return traced


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("embed", (1, "embed")),
        ("embed-pool", (1, "embed pool")),
        ("respond", (1, "respond (second turn)")),
        ("evaluate", (0, "evaluate tiny, answers")),
        ("fine-tune", (1, "fine-tune")),
    ],
)
def test_the_first_stage_of_the_name_is_traced(tmp_path, chosen, expected):
    lines = Lines()
    names = "embed pool", "respond (second turn)", "embed", "fine-tune", "evaluate tiny"
    profiler = StageProfiler(lines, chosen, tmp_path)
    stages = [(0, "evaluate tiny, answers"), *((i, name) for i in (1, 2) for name in names)]
    assert run(profiler, *stages) == [expected]
    profiler.close()
    (line,) = lines.lines
    assert "there were 1 device calls" in line


def test_a_stage_that_did_not_run_is_named(tmp_path):
    lines = Lines()
    profiler = StageProfiler(lines, "topics", tmp_path)
    assert run(profiler, (1, "respond")) == []
    profiler.close()
    (line,) = lines.lines
    assert "--profile=topics" in line


def test_a_misspelled_stage_is_told_the_others():
    with pytest.raises(UserError, match=r"--profile=train: there is no such stage; choose one of .*respond.*fine-tune"):
        check_stage("train")
    assert {"synthesize", "assess", "check-the-judge"} <= set(PROFILED)
