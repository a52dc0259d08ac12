"""What a command's errors look like: one line on standard error and an exit code."""

import errno
import sys

import jax
import pytest

from isheep_jax.cli.errors import disk_is_full, run_command, without_sections
from isheep_jax.cli.signals import command_line
from isheep_jax.errors import UserError


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: write failed [OS error 28: ENOSPC No space left on device]"),
    ],
)
def test_full_disk_is_recognized_also_when_library_wraps_it(error):
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert disk_is_full(error)
    assert disk_is_full(wrapped)
    assert not disk_is_full(ValueError("something else"))


def exit_code_and_line(capsys, raised):
    def fail(arguments):
        raise raised

    code = run_command(fail, "isheep_jax.train")
    return code, capsys.readouterr().err.strip()


def test_bad_input_ends_with_its_line_and_code_2(capsys):
    assert exit_code_and_line(capsys, UserError("a\nb")) == (2, "error: a b")


def test_settings_lose_their_sections_and_files_keep_their_names():
    text = "--decode.slots=3 and model.path: model.safetensors, /run/model/model.safetensors, /decode.slots"
    expected = "--slots=3 and --path: model.safetensors, /run/model/model.safetensors, /decode.slots"
    assert without_sections(text, "decode", "model") == expected


def test_working_directory_that_is_gone_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    code, line = exit_code_and_line(capsys, None)
    assert (code, line) == (2, "error: the working directory is gone: change to one that is there")


def test_file_that_cannot_be_opened_is_named(capsys):
    code, line = exit_code_and_line(capsys, PermissionError(errno.EACCES, "Permission denied", "/x/y"))
    assert (code, line) == (2, "error: /x/y: Permission denied")


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nMore.")]
)
def test_too_little_memory_names_the_settings_that_need_less(capsys, error):
    code, line = exit_code_and_line(capsys, error)
    assert code == 2
    assert line.startswith("error: out of memory: lower decode.slots")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError):
        exit_code_and_line(None, jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_disk_that_is_full_is_one_line_where_library_names_no_file(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model=m"])
    code, line = exit_code_and_line(capsys, OSError(errno.ENOSPC, "No space left on device"))
    assert code == 2
    assert line.startswith("error: no space left on a disk ")
    assert line.count("\n") == 0


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config=tiny", "--workdir=a b"])
    code, line = exit_code_and_line(capsys, KeyboardInterrupt())
    assert code == 130
    assert "python -m isheep_jax.train --config=tiny '--workdir=a b'" in line


def test_command_is_written_so_that_shell_reads_it_back():
    assert command_line("m", ["--prompt", "it's"]) == "python -m m --prompt 'it'\"'\"'s'"
