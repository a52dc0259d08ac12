"""One owner per directory: a second process that would write there is refused, and told who is at work.

The owner's record, `.lock` in the directory, names host and process, and counts up every few seconds. It is removed in
the end; what a killed process leaves is no obstacle.

On a disk of this machine, and on NFS that passes locks on, the owner also holds an flock on that file, which ends with
its process: a killed owner is seen at once, and two processes never both own the directory. Where such locks are not to
be had (object stores, some network file systems) or reach this machine only (NFS mounted with local locks), the record
decides. An owner on another machine counts as dead when its record has not changed for `_SILENCE` seconds, so that the
next one waits that long. Two processes that start in the same second there both write their record; the one that reads
its own after `_SETTLING` seconds goes on. An owner that was suspended for longer than `_SILENCE` may be replaced: it
finds another's record when it goes on, and `check` then raises. What it wrote in between is not prevented.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError, printable
from isheep_jax.files import as_user_error, make_directory, on_object_store

NAME = ".lock"
# Seconds between two counts of the record, and without one after which an owner on another machine is dead.
_INTERVAL = 10.0
_SILENCE = 35.0
# Seconds after which the records of two processes that started together are all visible.
_SETTLING = 2.0
# Seconds between two looks at a directory that another process owns.
_POLL = 1.0
# What the system says where files cannot be locked, and where another process has the lock or removes the file.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT)
# Of a lock, and the pause between them (s): `owner_of` holds it for an instant.
_TRIES, _PAUSE = 3, 0.1


@contextlib.contextmanager
def owned(setting: str, directory: epath.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Owns a directory, which is made if need be, until the context ends; the thread that owns it may do so again.

    All processes of a cluster call this; the primary owns the directory for them.

    Args:
        setting: Name of the setting that has the path, for messages.
        directory: The directory.
        wait: Wait until no other process owns it, instead of raising.

    Raises:
        UserError: Another process owns the directory, and the message says which; or nothing can be written there.
    """
    directory = epath.Path(directory)
    key = str(directory) if on_object_store(directory) else os.path.realpath(directory)
    known = _owned.get(key)
    if known is not None and known.thread == threading.get_ident():
        yield
        return
    lock = _Lock(setting, directory)
    distributed.from_primary(lambda: lock.acquire(wait))
    _owned[key] = lock
    try:
        yield
    finally:
        del _owned[key]
        lock.release()


def check(directory: epath.PathLike) -> None:
    """Raises UserError where another process has taken a directory from this one, see the module."""
    for lock in list(_owned.values()):
        if lock.directory == epath.Path(directory):
            lock.check()


def owner_of(directory: epath.PathLike) -> str:
    """Returns which other process owns a directory, such as "process 12 on host a"; "" for none.

    Nothing is written. Where only the record decides, one that a killed process left counts as an owner.
    """
    path = epath.Path(directory) / NAME
    try:
        record = _Record.read(path)
        if record is None or (record.machine == _machine() and record.pid == os.getpid()):
            return ""
        if on_object_store(path) or record.machine != _machine():
            return record.owner
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return record.owner
    except OSError:
        return ""
    return ""


@dataclass(frozen=True)
class _Record:
    """What `.lock` says of the owner.

    machine: identifies the running kernel, which host names do not in containers. token: of this ownership. count: of
    the intervals since it began.
    """

    host: str
    pid: int
    machine: str
    since: str
    token: str
    count: int = 0

    @classmethod
    def mine(cls) -> "_Record":
        since = datetime.datetime.now().isoformat(" ", "seconds")
        return cls(socket.gethostname(), os.getpid(), _machine(), since, secrets.token_hex(8))

    @classmethod
    def read(cls, path: epath.Path) -> "_Record | None":
        """Returns the record in a file; None where there is none, or none that can be read."""
        try:
            values = json.loads(path.read_bytes())
            record = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None
        texts = (record.host, record.machine, record.since, record.token)
        good = isinstance(record.pid, int) and all(isinstance(text, str) and text.isprintable() for text in texts)
        return record if good else None

    @property
    def owner(self) -> str:
        return f"process {self.pid} on host {self.host[:100]} (since {self.since[:30]})"

    def encode(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self)) + "\n").encode()


class _Lock:
    """The ownership of a directory by this process."""

    def __init__(self, setting: str, directory: epath.Path):
        self.directory, self.thread = directory, threading.get_ident()
        self._setting, self._path = setting, directory / NAME
        self._record = _Record.mine()
        self._file: int | None = None  # descriptor of the locked file; None where files cannot be locked
        self._made: list[epath.Path] = []
        self._beating: threading.Thread | None = None
        self._released = threading.Event()
        self._is_mine = False  # the record in the directory
        self._lost = ""  # who has taken the directory from this process

    def acquire(self, wait: bool) -> None:
        """Takes the directory. wait: until nobody else has it."""
        try:
            while owner := self._try():
                if not wait:
                    raise UserError(
                        f"{self._setting}: {self.directory} is in use by {owner}; wait until it ends, stop it, or name "
                        "another directory"
                    )
                time.sleep(_POLL)
        except BaseException:
            self._leave()
            raise
        self._beating = threading.Thread(target=self._beat, name="isheep_jax directory lock", daemon=True)
        self._beating.start()

    def check(self) -> None:
        if self._lost:
            raise UserError(f"{self._setting}: {self.directory} was taken over by {self._lost}; this process ends")

    def release(self) -> None:
        """Gives the directory back, and removes it if it is new and still empty."""
        if self._beating is None:
            return
        self._released.set()
        self._beating.join()
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            if self._is_mine and not self._lost:
                self._path.unlink(missing_ok=True)
            for directory in self._made:
                Path(directory).rmdir()  # which refuses one that is not empty
        self._close()

    def _try(self) -> str:
        """Returns "" after taking the directory, or who has it."""
        if not on_object_store(self.directory):
            self._made += [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        make_directory(self._setting, self.directory)
        with as_user_error(self._setting, self.directory):
            if not on_object_store(self.directory) and not self._lock_file():
                record = _Record.read(self._path)
                return record.owner if record else "another process"
            owner = self._replace_record()
            if owner:
                self._close()
            return owner

    def _lock_file(self) -> bool:
        """Locks the file; returns False where another process has. Where files cannot be locked it does nothing."""
        for _ in range(_TRIES):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The owner before may have removed the file after it was opened here.
                if os.path.samestat(os.fstat(file), Path(self._path).stat()):
                    self._file = file
                    return True
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return True
                if error.errno not in _TAKEN:
                    raise
            finally:
                if self._file is None:
                    os.close(file)
            time.sleep(_PAUSE)
        return False

    def _replace_record(self) -> str:
        """Writes this process's record; returns the owner if that is another one after all."""
        before = _Record.read(self._path)
        if before is not None and not self._is_dead(before) and self._is_counting(before):
            return before.owner
        self._is_mine = True
        self._write()
        if self._file is None:
            time.sleep(_SETTLING)
            now = _Record.read(self._path)
            if now is not None and now.token != self._record.token:
                self._is_mine = False
                return now.owner
        return ""

    def _is_dead(self, before: _Record) -> bool:
        """Returns whether the owner that a record names is known to have ended."""
        if before.machine != _machine():
            return False
        # Containers on one machine have host names and numbers of processes of their own.
        return self._file is not None or (before.host == self._record.host and not _is_alive(before.pid))

    def _is_counting(self, before: _Record) -> bool:
        """Returns whether a record changes within the time in which that of a live owner does."""
        waits = f"waiting up to {_SILENCE:.0f} s to see whether it still is"
        print(printable(f"{self.directory} was in use by {before.owner}; {waits}"), file=sys.stderr)
        deadline = time.monotonic() + _SILENCE
        while time.monotonic() < deadline:
            time.sleep(_POLL)
            now = _Record.read(self._path)
            if now != before:
                return now is not None
        return False

    def _beat(self) -> None:
        while not self._released.wait(_INTERVAL):
            # A full disk or a server that is away is no reason to stop: only others wait for the record.
            with contextlib.suppress(Exception):
                now = _Record.read(self._path)
                if now is not None and now.token != self._record.token:
                    self._lost = now.owner
                    return
                self._record = dataclasses.replace(self._record, count=self._record.count + 1)
                self._write()

    def _write(self) -> None:
        data = self._record.encode()
        if self._file is None:
            self._path.write_bytes(data)
        else:  # in place: the lock is on this file, not on its name
            os.pwrite(self._file, data, 0)
            os.ftruncate(self._file, len(data))

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


# Locks of this process by the path of their directory.
_owned: dict[str, _Lock] = {}


def _machine() -> str:
    """Returns what identifies the running kernel; locks on files reach all of its processes."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
