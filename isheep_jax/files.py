"""Atomic writes of files and directories, on disks and in object stores; the primary process writes."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError, one_line

# Of a write whose temporary file another process removes.
_TRIES = 5


def on_object_store(path: epath.PathLike) -> bool:
    """Returns whether the path is in a bucket, which has no appends or renames but writes each object atomically."""
    return "://" in str(path)


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


def check_writable(setting: str, path: epath.Path) -> None:
    """Makes a directory, or removes the remainders of killed processes from it. Call it in the primary.

    setting: name of the setting that has the path, for messages.
    Raises UserError when the path is a file or nothing can be written there.
    """
    make_directory(setting, path)
    probe = _temporary(path / "probe")
    with as_user_error(setting, path):
        remove_remainders(path)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def as_user_error(setting: str, path: epath.Path) -> Iterator[None]:
    """Turns the errors of a disk or bucket that cannot be written into one line that names the setting."""
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
        raise UserError(f"{setting}: cannot write in {path}: {reason}; name another directory") from error


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
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; it should be the JSON file that the run wrote") from error


def read_json_if_there(path: epath.Path) -> Any:
    """Reads a JSON file on the primary for all processes; None if there is no such file."""
    return distributed.from_primary(lambda: read_json(path) if path.exists() else None)


@contextlib.contextmanager
def whole_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """Yields the path where the primary writes the new content of `directory`, which replaces the old one at the end.

    On a disk this is a sibling directory that is renamed. A bucket cannot rename: there the content is complete once
    the file that is written last exists, and a later attempt replaces an incomplete directory.
    """
    directory = epath.Path(directory)
    staging = directory if on_object_store(directory) else directory.with_name(directory.name + ".partial")
    if distributed.is_primary():
        for stale in {staging, directory}:
            stale.rmtree(missing_ok=True)
        staging.mkdir(parents=True)
    yield staging
    if distributed.is_primary() and staging != directory:
        staging.rename(directory)
