"""Files are whole, whoever else writes them, and what killed processes leave is removed and never read."""

import errno
import os

import pytest
from etils import epath

from isheep_jax import files
from isheep_jax.errors import UserError
from isheep_jax.files import check_writable, write_whole


def test_a_write_removes_remainders_of_its_own_file_alone(tmp_path):
    for name in (".a.json.0f3a.tmp", ".b.json.0f3a.tmp"):
        (tmp_path / name).write_bytes(b"half")
    write_whole(tmp_path / "a.json", b"whole")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.json": b"whole",
        ".b.json.0f3a.tmp": b"half",
    }


def test_two_processes_that_write_a_file_do_not_meet(tmp_path, monkeypatch):
    """The second writes between the first one's last byte and its rename, and takes its file for a remainder."""
    path, fsync, waiting = tmp_path / "a.json", os.fsync, [b"second"]

    def interrupted(descriptor):
        fsync(descriptor)
        if waiting:
            write_whole(path, waiting.pop())
            assert path.read_bytes() == b"second"

    monkeypatch.setattr(files.os, "fsync", interrupted)
    write_whole(path, b"first")
    assert path.read_bytes() == b"first"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_a_refused_write_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.json", b"whole")
    assert list(tmp_path.iterdir()) == []


def test_a_writable_directory_is_made_and_has_no_remainders(tmp_path):
    check_writable("--output", epath.Path(tmp_path / "a" / "b"))
    (tmp_path / "a" / ".evaluation.json.0f3a.tmp").write_bytes(b"half")
    check_writable("--output", epath.Path(tmp_path / "a"))
    assert [child.name for child in (tmp_path / "a").iterdir()] == ["b"]


def test_a_bucket_without_its_package_is_refused_in_one_line(monkeypatch):
    def refuse(self):
        raise ImportError("Please install gcsfs\nto access Google Storage")

    monkeypatch.setattr(type(epath.Path("/")), "exists", refuse)
    with pytest.raises(
        UserError, match=r"--output: gs://.* needs a package that is not installed: Please install gcsfs to"
    ):
        check_writable("--output", epath.Path("gs://bucket/a"))
