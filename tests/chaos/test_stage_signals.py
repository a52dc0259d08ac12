"""A signal, or standard output that fails, in any stage is one line and an exit code, and the same command goes on."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_kinds import STAGES, RunCommand, instants, results, wait_for

pytestmark = pytest.mark.chaos

RUN = RunCommand()
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    RUN.finish(directory)
    return results(directory)


def stopped(
    directory: Path, words: str, *signals: int, pause: float = 0.0, between: float = 0.1, command: RunCommand = RUN
) -> None:
    """Starts a run, sends the signals in the stage whose line has the words, and checks how it ends."""
    process = command.start(directory)
    wait_for(process, words)
    time.sleep(pause)
    for number in signals:
        process.send_signal(number)
        time.sleep(between)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signals[0]
    (line,) = errors.splitlines()
    assert line.startswith("stopped by ")
    assert f"--workdir={directory}" in line


def test_run_that_signals_stop_in_every_stage_ends_with_same_bytes(whole, tmp_path):
    directory = tmp_path / "run"
    for index, words in enumerate(STAGES):
        stopped(directory, words, SIGNALS[index % len(SIGNALS)])
    RUN.finish(directory)
    assert results(directory) == whole


@pytest.mark.parametrize("words", ["iteration 1 · synthesize", "iteration 1 · fine-tune"])
@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_at_any_time_adds_no_line(tmp_path, number, words):
    pauses = instants(seed=number, longest=1.5)
    long = RunCommand(("--sft.epochs=100",))
    for attempt in range(4):
        pause, between = next(pauses), next(pauses) / 10
        stopped(tmp_path / f"run {attempt}", words, number, number, pause=pause, between=between, command=long)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_in_first_seconds_is_one_line(tmp_path, number):
    pauses = instants(seed=number, longest=6)
    for _ in range(12):
        process = RUN.start(tmp_path / "run")
        time.sleep(0.5 + next(pauses))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("words", STAGES)
def test_reader_that_goes_away_in_a_stage_is_one_line_and_same_command_goes_on(whole, tmp_path, words):
    process = RUN.start(tmp_path / "run")
    wait_for(process, words)
    process.stdout.close()
    (line,) = process.stderr.read().splitlines()
    assert process.wait(60) == 2
    assert line.startswith("error: standard output cannot be written: it is closed; the same command goes on from here")
    RUN.finish(tmp_path / "run")
    assert results(tmp_path / "run") == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_standard_output_is_one_line_and_same_command_goes_on(whole, tmp_path):
    with Path("/dev/full").open("w") as full:
        process = RUN.start(tmp_path / "run", stdout=full)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.startswith("error: standard output cannot be written: No space left on device")
    RUN.finish(tmp_path / "run")
    assert results(tmp_path / "run") == whole


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_run_whose_terminal_knows_ascii_only_ends_with_same_bytes(whole, tmp_path, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    RUN.finish(tmp_path / "run")
    assert results(tmp_path / "run") == whole
    assert "iteration 1 · synthesize" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_log_that_cannot_be_written_does_not_end_the_run(whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    process = RUN.start(tmp_path / "run", stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert output.count("warning: ") == 1
    assert "log.txt: No space left on device; no log from here on" in output
    assert results(tmp_path / "run") == whole
