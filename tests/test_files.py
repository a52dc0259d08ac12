"""Files are whole, whoever else writes them, and what killed processes leave is removed and never read."""

import errno
import os
import threading

import pytest
from etils import epath

from isheep_jax import files
from isheep_jax.errors import UserError
from isheep_jax.files import check_new_directory, check_output, check_writable, is_there, write_atomically, write_whole


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


def test_a_directory_that_could_be_made_is_not_made_by_the_check(tmp_path):
    check_writable("--output", epath.Path(tmp_path / "a" / "b"), make=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: cannot write in .*file/a: Not a directory"):
        check_writable("--output", epath.Path(tmp_path / "file" / "a"), make=False)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "is a directory"), ("none/a", "there is no directory"), ("a" * 300, "File name too long")],
)
def test_a_file_that_cannot_be_written_is_refused_before_and_nothing_is_left(tmp_path, name, message):
    with pytest.raises(UserError, match=f"^--output: .*{message}") as error:
        check_output("--output", f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_noticed_before_hours_are_spent(tmp_path, monkeypatch):
    def refuse(self, data):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(type(epath.Path("/")), "write_bytes", refuse)
    checks = [
        lambda: check_output("--output", str(tmp_path / "a")),
        lambda: check_new_directory("--output", epath.Path(tmp_path / "a")),
        lambda: check_writable("--output", epath.Path(tmp_path)),
    ]
    for check in checks:
        with pytest.raises(UserError, match=r"cannot write in .*Read-only file system"):
            check()


def test_a_pipe_is_written_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(check_output("--output", str(pipe)), b"all")
    reader.join(60)
    assert read == [b"all"]
    assert pipe.is_fifo()


def test_what_cannot_be_looked_at_is_not_taken_for_missing(tmp_path):
    assert not is_there(epath.Path(tmp_path / "no"))
    (tmp_path / "file").write_text("")
    assert is_there(epath.Path(tmp_path / "file"))
    assert not is_there(epath.Path(tmp_path / "file" / "within"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop cannot be read: Too many levels of symbolic links"):
        is_there(epath.Path(tmp_path / "loop"))
