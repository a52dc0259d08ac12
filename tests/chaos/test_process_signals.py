"""SIGTERM to one of several processes, or to all at once, ends all in time; training leaves a checkpoint."""

import time

import pytest
from run_kinds import STAGES, results
from test_distributed import Group, host, run, train

pytestmark = pytest.mark.chaos


def stopped(command: list[str], output, words: str, signaled: tuple[int, ...], pause: float = 0.0) -> float:
    """Starts two processes, stops them in the stage whose line has the words, and returns how long they took to end."""
    with Group([command] * 2, output) as group:
        group.wait_for(0, words)
        time.sleep(pause)
        for index in signaled:
            group.processes[index].terminate()
        began = time.monotonic()
        codes = group.codes(100)
        seconds = time.monotonic() - began
        assert codes == [143, 143]
        for index in (0, 1):
            (line,) = group.text(index, "err").splitlines()
            if index in signaled:
                # Whose word comes first ends the others as well.
                assert line.startswith("stopped by SIGTERM; the same command goes on from here") or "SIGTERM" in line
            else:
                assert line == f"error: {host(1 - index)}: stopped by SIGTERM"
    return seconds


@pytest.mark.parametrize("signaled", [(0,), (1,), (0, 1)], ids=["0", "1", "both"])
def test_run_that_signals_stop_in_every_stage_ends_with_same_bytes(tmp_path, signaled):
    run(2, tmp_path / "whole")
    command = train(f"--workdir={tmp_path}/run")
    for turn, words in enumerate(STAGES):
        seconds = stopped(command, tmp_path / f"output-{turn}", words, signaled)
        print(f"{words}: {seconds:.1f} s", flush=True)
        assert seconds < 30
    run(2, tmp_path / "run")
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("signaled", [(0,), (1,), (0, 1)], ids=["0", "1", "both"])
def test_training_that_signals_stop_goes_on_after_its_last_update(tmp_path, signaled):
    long = ("--sft.epochs=400", "--sft.checkpoint_every=100000", "--iterations=1")
    command = train(f"--workdir={tmp_path}/run", *long)
    seconds = stopped(command, tmp_path / "output", "1 · fine-tune", signaled, pause=20)
    print(f"fine-tune: {seconds:.1f} s", flush=True)
    (checkpoint,) = (tmp_path / "run" / "iteration_1" / "checkpoints").glob("[0-9]*")
    assert int(checkpoint.name) % 100000
