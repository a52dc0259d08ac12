"""A disk that fills in any stage is one line, and the same command goes on once there is space."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_kinds import STAGES, RunCommand, results, wait_for

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"),
]


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("settings", [(), ("--sft.method=lora",)], ids=["full", "lora"])
def test_disk_that_fills_in_every_stage_is_one_line_and_loses_nothing(tmp_path, settings):
    command = RunCommand(settings)
    command.finish(tmp_path / "whole")
    with small_disk(tmp_path / "disk") as disk:
        for words in STAGES:
            process = command.start(disk / "run")
            wait_for(process, words)
            fill(disk / "filler")
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 2, errors
            assert len(errors.splitlines()) == 1, errors
            assert "o space left" in errors
            assert str(disk / "run") in errors
            (disk / "filler").unlink()
        command.finish(disk / "run")
        assert results(disk / "run") == results(tmp_path / "whole")
