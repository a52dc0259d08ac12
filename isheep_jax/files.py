"""Atomic writes of files and directories, on disks and in object stores, and digests by which damage to them is found.

The primary process writes, but for what all processes write into a `whole_directory`.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath
from etils.epath.backend import fsspec_backend

from isheep_jax import distributed
from isheep_jax.errors import UserError, one_line

# Name of the digest that an object carries, and what it does not cover: times, in which equal runs differ.
_SEAL = "sha256"
_UNSEALED = (_SEAL, "seconds", "speed")
# Bytes that are hashed at a time.
_BLOCK = 16 * 2**20
# Threads that read side by side: one cannot saturate a disk, and in a bucket each read waits for an answer.
_READERS, _BUCKET_READERS = 8, 32
# Of a write whose temporary file another process removes.
_TRIES = 5


def on_object_store(path: epath.PathLike) -> bool:
    """Returns whether the path is in a bucket, which has no appends or renames but writes each object atomically."""
    return "://" in str(path)


def reader_threads(path: epath.PathLike) -> int:
    """Returns how many threads should read at the same time where `path` is."""
    return _BUCKET_READERS if on_object_store(path) else _READERS


def read_range(path: epath.Path, start: int, out: memoryview) -> int:
    """Reads the bytes of a file from `start` on into `out`. Returns how many there were: fewer where the file ends.

    In a bucket this is a single request. Raises OSError when the file cannot be read.
    """
    if (bucket := _bucket_of(path)) is not None:
        data = bucket.cat_file(str(path), start, start + len(out))
        out[: len(data)] = data
        return len(data)
    with path.open("rb") as file:
        file.seek(start)
        read = 0
        while read < len(out) and (count := file.readinto(out[read:])):
            read += count
    return read


def _bucket_of(path: epath.Path) -> Any:
    """Returns the fsspec file system of a path in a bucket; None for a disk, and where fsspec has none for it."""
    if not on_object_store(path):
        return None
    try:
        return fsspec_backend.fs(path)
    except ImportError:
        return None  # TensorFlow's file systems are in its place


def utf8(text: str) -> bytes:
    """Returns the text as UTF-8; lone surrogates, which that cannot hold, become question marks."""
    return text.encode("utf-8", "replace")


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file on the primary so that no reader sees a part of it. Raises OSError without leaving a file."""
    if not distributed.is_primary():
        return
    path = epath.Path(path)
    if on_object_store(path):
        path.write_bytes(data)
        return
    for tries_left in reversed(range(_TRIES)):
        try:
            _write_and_rename(path, data)
            break
        except FileNotFoundError:
            # Another process that writes here took the temporary file for a remainder.
            if not tries_left:
                raise
    # Processes that were killed while they wrote this file leave temporary files that no later write replaces.
    with contextlib.suppress(OSError):
        for sibling in path.parent.iterdir():
            if sibling.name.startswith(f".{path.name}.") and sibling.name.endswith(".tmp"):
                sibling.unlink(missing_ok=True)


def _write_and_rename(path: epath.Path, data: bytes) -> None:
    if is_device(path):
        path.write_bytes(data)
        return
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[BinaryIO]:
    """Yields a file, of any size, that takes the place of `path` at the end; nothing is left of one that fails.

    Each process may write, not only the primary. A kill leaves a temporary file, which `remove_remainders` knows.
    """
    target = path if on_object_store(path) else _temporary(path)
    try:
        with target.open("wb") as file:
            yield file
            if target != path:
                file.flush()
                os.fsync(file.fileno())
        if target != path:
            target.replace(path)
    except BaseException:
        # A bucket keeps what has come so far.
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise


def is_device(path: epath.Path) -> bool:
    """Returns whether the path is a device or a pipe, such as /dev/null, whose place no file may take."""
    # Not `epath`, which takes whatever is no directory for a file.
    local = Path(path)
    return not on_object_store(path) and local.exists() and not (local.is_file() or local.is_dir())


def _temporary(path: epath.Path) -> epath.Path:
    """Returns a path next to `path` that no other process uses; `remove_remainders` knows it by its name."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_remainders(directory: epath.Path) -> None:
    """Removes the temporary files and directories that killed processes left in a directory."""
    for remainder in directory.glob(".*.tmp"):
        remainder.rmtree(missing_ok=True)


def make_directory(setting: str, path: epath.Path) -> None:
    """Makes a directory unless it is there.

    setting: name of the setting that has the path, for messages.
    Raises UserError when the path is a file or cannot be made.
    """
    with as_user_error(setting, path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{setting}: {path} is a file; name a directory")
        path.mkdir(parents=True, exist_ok=True)


def check_writable(setting: str, path: epath.Path, *, make: bool = True) -> None:
    """Makes a directory, or removes the remainders of killed processes from it. Call it in the primary.

    setting: name of the setting that has the path, for messages. make: False leaves nothing behind where the directory
    is not there: what is checked is whether it could be made.
    Raises UserError when the path is a file or nothing can be written there.
    """
    if make:
        make_directory(setting, path)
    with as_user_error(setting, path):
        if path.exists() and not path.is_dir():
            raise UserError(f"{setting}: {path} is a file; name a directory")
        if path.is_dir():
            remove_remainders(path)
        _probe(path if make or on_object_store(path) else _nearest(path))


def _nearest(path: epath.Path) -> epath.Path:
    """Returns the directory, or the nearest one above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_output(setting: str, name: str) -> epath.Path:
    """Returns the path of a file to be written, after a check, before hours are spent, that this is possible.

    setting: name of the setting that has the file's name, for messages.
    Raises UserError when it is a directory or is in none, or nothing can be written there.
    """
    path = epath.Path(name).expanduser()
    with as_user_error(setting, path):
        if path.is_dir():
            raise UserError(f"{setting}: {path} is a directory; name a file")
        _check_parent(setting, path)
        if not is_device(path):
            _probe(path.parent, path.name)
    return path


def check_new_directory(setting: str, path: epath.Path) -> None:
    """Raises UserError unless the directory is new and can be made. setting: the one that has the path."""
    with as_user_error(setting, path):
        if path.exists():
            raise UserError(f"{setting}: {path} exists; name a directory that does not")
        _check_parent(setting, path)
        _probe(path.parent, path.name)


def _check_parent(setting: str, path: epath.Path) -> None:
    # An object store has no directories, only names.
    if not on_object_store(path) and not path.parent.is_dir():
        raise UserError(f"{setting}: there is no directory {path.parent}")


def _probe(directory: epath.Path, name: str = "probe") -> None:
    """Writes an empty file with a name like `name` and removes it."""
    probe = _temporary(directory / name)
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)


@contextlib.contextmanager
def as_user_error(setting: str, path: epath.Path) -> Iterator[None]:
    """Turns errors of disks and buckets into one line that names the setting, the path and the reason."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{setting}: {path} needs a package that is not installed: {one_line(error)}") from error
    except Exception as error:
        # Each kind of bucket has errors of its own.
        if not (isinstance(error, OSError) or on_object_store(path)):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{setting}: cannot write in {path}: {reason}; name another place") from error


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes `path` atomically. Raises UserError when the file system refuses (no space, no permission)."""
    try:
        write_whole(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; mend that and run the same command to go on") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` atomically as indented JSON. Raises UserError when the file system refuses."""
    write_atomically(path, utf8(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file that a run wrote. Raises UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(epath.Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}; it should be the JSON file that the run wrote") from error


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the digest of its values, which `check_seal` compares; times may differ."""
    return {**{name: v for name, v in value.items() if name != _SEAL}, _SEAL: _seal_of(value)}


def check_seal(value: Any, where: str, remedy: str) -> dict[str, Any]:
    """Returns a JSON object that `sealed` made; one without a digest, of an older version, as it is.

    where: the file, and what in it. remedy: what the user can do.
    Raises UserError when it is no object, or not the one that was written.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} is damaged: it should be a JSON object; {remedy}")
    if _SEAL in value and value[_SEAL] != _seal_of(value):
        raise UserError(f"{where} is damaged: it has changed since it was written; {remedy}")
    return value


def _seal_of(value: Mapping[str, Any]) -> str:
    covered = {name: v for name, v in value.items() if name not in _UNSEALED}
    return sha256(utf8(json.dumps(covered, sort_keys=True, ensure_ascii=False)))


def sha256(data: bytes) -> str:
    """Returns the sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_digests(paths: Sequence[epath.Path]) -> list[str]:
    """Returns the sha256 of each file, of any size. Raises OSError for one that cannot be read."""
    with ThreadPoolExecutor(max([_READERS, *map(reader_threads, paths)])) as readers:
        return list(readers.map(_file_digest, paths))


def _file_digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_with_digest(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically, and its digest beside it. Raises UserError when the file system refuses.

    A kill at any instant leaves a file that `read_with_digest` takes: the one before or the new one.
    """
    if not distributed.is_primary():
        return
    place, new = _digest_place(path), sha256(data)
    before = sha256(path.read_bytes()) if path.exists() else new
    write_atomically(place, "".join(f"{digest}\n" for digest in dict.fromkeys((new, before))).encode())
    write_atomically(path, data)
    if before != new:
        write_atomically(place, f"{new}\n".encode())


def read_with_digest(path: epath.Path, remedy: str) -> bytes:
    """Returns the bytes of a file that `write_with_digest` wrote; of a file without a digest, what is there.

    remedy: what the user can do with a damaged file. Raises UserError when it has changed or cannot be read.
    """
    try:
        data, place = path.read_bytes(), _digest_place(path)
        known = place.read_bytes().decode("ascii", "replace").split() if place.exists() else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}; {remedy}") from error
    if known is not None and sha256(data) not in known:
        raise UserError(f"{path} is damaged: it has changed since it was written; {remedy}")
    return data


def _digest_place(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.{_SEAL}")


def full_path(path: epath.Path) -> epath.Path:
    """Returns the path from the root of the file system or bucket."""
    return path if on_object_store(path) else path.resolve()


def is_there(path: epath.Path) -> bool:
    """Returns whether there is a file or directory. Raises UserError where that cannot be known.

    `Path.exists` takes one that may not be looked at (no permission, a server that is away) for one that is not there.
    """
    if on_object_store(path):
        return path.exists()
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend that and run the same command again") from None
    return True


def read_json_if_there(path: epath.Path) -> Any:
    """Reads a JSON file on the primary for all processes; None if there is no such file."""
    return distributed.from_primary(lambda: read_json(path) if is_there(path) else None)


@contextlib.contextmanager
def whole_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """Yields the path where the processes write the new content of `directory`, which replaces the old one at the end.

    On a disk this is a sibling directory that is renamed. A bucket cannot rename: there the content is complete once
    the file that is written last exists, and a later attempt replaces an incomplete directory. All processes call this,
    and leave the context together.
    """
    directory = epath.Path(directory)
    staging = directory if on_object_store(directory) else directory.with_name(directory.name + ".partial")
    if distributed.is_primary():
        for stale in {staging, directory}:
            stale.rmtree(missing_ok=True)
        staging.mkdir(parents=True)
    distributed.wait_for_all()
    if not distributed.is_primary():
        # A network file system may not show a new directory yet, but its server knows it when asked to make it.
        staging.mkdir(parents=True, exist_ok=True)
    yield staging
    distributed.wait_for_all()
    if distributed.is_primary() and staging != directory:
        staging.rename(directory)
    distributed.wait_for_all()
