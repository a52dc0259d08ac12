"""Whichever of several processes is killed, in any stage, all end within a minute and the same command goes on."""

import time

import pytest
from run_kinds import STAGES, results
from test_distributed import Group, host, run, train

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("count", [2, 4])
def test_run_whose_processes_are_killed_in_every_stage_ends_with_same_bytes(tmp_path, count):
    run(count, tmp_path / "whole")
    command = train(f"--workdir={tmp_path}/run")
    for turn, words in enumerate(STAGES):
        lost = (0, count - 1)[turn % 2]
        with Group([command] * count, tmp_path / f"output-{turn}") as group:
            group.kill(lost, words)
            killed = time.monotonic()
            codes = group.codes(100)
            assert time.monotonic() - killed < 60
            assert codes == [-9 if index == lost else 1 for index in range(count)]
            for index in set(range(count)) - {lost}:
                (line,) = group.errors(index)
                assert line.startswith(f"error: {host(lost, count)}")
                assert line.endswith("start every process again")
    run(count, tmp_path / "run")
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
