"""A run that is killed at random instants ends with the bytes of a run that was left alone."""

import contextlib
import subprocess
import time

import pytest
from run_kinds import KINDS, RunCommand, instants, judge, results

# Kills over all kinds: 100.
KILLS = 20


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS)
def test_run_killed_at_random_instants_ends_with_same_bytes(tmp_path, kind):
    with judge() as url:
        command = RunCommand(KINDS[kind] + ((f"--assess.judge={url}",) if kind == "server judge" else ()))
        started = time.monotonic()
        command.finish(tmp_path / "whole")
        pauses = instants(seed=len(kind), longest=time.monotonic() - started)
        expected = results(tmp_path / "whole")
        kills = runs = 0
        while kills < KILLS:
            runs += 1
            directory = tmp_path / f"run {runs}"
            while (code := _killed_after(command, directory, next(pauses))) == -9:
                kills += 1
                if kills == KILLS:
                    command.finish(directory)
                    break
            else:
                assert code == 0
            found = results(directory)
            assert found.keys() == expected.keys()
            assert [name for name in expected if found[name] != expected[name]] == []
            assert [name for name, data in found.items() if str(directory).encode() in data] == []


def _killed_after(command: RunCommand, directory, seconds: float) -> int:
    """Starts the command, kills it after so many seconds, and returns its exit code."""
    with (directory.with_suffix(".out")).open("a") as output:
        process = command.start(directory, stdout=output, stderr=output)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        process.kill()
        return process.wait()
