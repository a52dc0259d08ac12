"""A directory has one owner; the next one is told who that is, and a killed one is no obstacle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from memory_bucket import memory_bucket

from isheep_jax import directory_lock
from isheep_jax.directory_lock import check, owned, owner_of
from isheep_jax.errors import UserError

HOLD = """
import sys, time
from isheep_jax.directory_lock import owned
with owned("workdir", sys.argv[1]):
    print("owned", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def another(tmp_path):
    """Starts processes that own directories below tmp_path."""
    started = []

    def start(directory: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "owned\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def write_record(directory: Path, **changes) -> None:
    """Writes a record as the owner on another machine leaves it."""
    record = {"host": "b", "pid": 12, "machine": "other", "since": "2026-01-01 00:00:00", "token": "t", "count": 0}
    directory.mkdir(exist_ok=True)
    (directory / ".lock").write_text(json.dumps(record | changes) + "\n")


@pytest.fixture
def quick(monkeypatch):
    """Other machines are waited for in fractions of a second."""
    for name, seconds in {"_INTERVAL": 0.05, "_SILENCE": 0.3, "_SETTLING": 0.5, "_POLL": 0.02}.items():
        monkeypatch.setattr(directory_lock, name, seconds)


@pytest.fixture
def without_locks(monkeypatch, quick):
    """A file system without locks: the records alone decide."""
    monkeypatch.setattr(directory_lock._Lock, "_lock_file", lambda self: True)


def test_second_process_is_refused_and_told_who_is_at_work(tmp_path, another):
    process = another(tmp_path / "run")
    with (
        pytest.raises(UserError, match=rf"^workdir: .*run is in use by process {process.pid} on host \S+ \(since 2"),
        owned("workdir", tmp_path / "run"),
    ):
        pass
    assert str(process.pid) in owner_of(tmp_path / "run")


def test_killed_owner_is_no_obstacle(tmp_path, another):
    process = another(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    assert owner_of(tmp_path) == ""
    with owned("workdir", tmp_path):
        pass


def test_nothing_is_left_of_a_directory_that_was_not_used(tmp_path):
    with owned("workdir", tmp_path / "a" / "b"):
        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


def test_only_the_lock_is_removed_from_a_directory_that_was_used(tmp_path):
    with owned("workdir", tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["result"]


def test_owner_may_own_again_and_other_threads_may_not(tmp_path):
    refused = []

    def try_to_own() -> None:
        try:
            with owned("workdir", tmp_path):
                pass
        except UserError as error:
            refused.append(str(error))

    with owned("workdir", tmp_path), owned("workdir", tmp_path / ".." / tmp_path.name):
        thread = threading.Thread(target=try_to_own)
        thread.start()
        thread.join()
    assert len(refused) == 1
    try_to_own()
    assert len(refused) == 1


def test_who_waits_goes_on_when_the_owner_ends(tmp_path, another, monkeypatch):
    monkeypatch.setattr(directory_lock, "_POLL", 0.05)
    process = another(tmp_path)
    threading.Timer(0.3, process.kill).start()
    with owned("workdir", tmp_path, wait=True):
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("record", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_damaged_record_is_no_obstacle(tmp_path, record):
    (tmp_path / ".lock").write_text(record)
    with owned("workdir", tmp_path):
        pass


def test_silent_owner_on_another_machine_is_replaced(tmp_path, quick, capsys):
    write_record(tmp_path)
    with owned("workdir", tmp_path):
        assert owner_of(tmp_path) == ""
    assert "process 12 on host b" in capsys.readouterr().err


def test_owner_on_another_machine_that_counts_is_alive(tmp_path, quick):
    write_record(tmp_path)
    counting = threading.Event()

    def count() -> None:
        number = 0
        while not counting.wait(0.02):
            number += 1
            write_record(tmp_path, count=number)

    thread = threading.Thread(target=count)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 12 on host b"), owned("workdir", tmp_path):
            pass
    finally:
        counting.set()
        thread.join()
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "b"


def check_repeatedly(directory: Path) -> None:
    for _ in range(500):
        time.sleep(0.02)
        check(directory)


def test_owner_that_was_replaced_learns_of_it(tmp_path, quick):
    with owned("workdir", tmp_path):
        check(tmp_path)
        write_record(tmp_path)
        with pytest.raises(UserError, match="taken over by process 12 on host b"):
            check_repeatedly(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "b"


def test_without_locks_records_keep_others_out(tmp_path, without_locks):
    with owned("workdir", tmp_path):
        refused = []

        def try_to_own() -> None:
            try:
                with owned("workdir", tmp_path):
                    pass
            except UserError as error:
                refused.append(str(error))

        thread = threading.Thread(target=try_to_own)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in refused[0]
    with owned("workdir", tmp_path):
        pass


def test_of_two_that_start_together_without_locks_one_goes_on(tmp_path, without_locks):
    began, ended, owners = threading.Barrier(8), threading.Event(), []

    def start() -> None:
        began.wait()
        try:
            with owned("workdir", tmp_path):
                owners.append(threading.get_ident())
                ended.wait(10)
        except UserError:
            pass

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(owners) == 1


def test_bucket_has_one_owner(quick, monkeypatch):
    directory = memory_bucket(monkeypatch) / "run"
    with owned("workdir", directory):
        assert (directory / ".lock").exists()
    assert not (directory / ".lock").exists()


def test_file_and_unwritable_directory_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir: .*file is a file"), owned("workdir", tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="workdir: cannot write in /proc/x"), owned("workdir", epath.Path("/proc/x")):
        pass
