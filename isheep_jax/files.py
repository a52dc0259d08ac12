"""Atomic writes of files and directories, on disks and in object stores; the primary process writes."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError


def on_object_store(path: epath.PathLike) -> bool:
    """Returns whether the path is in a bucket, which has no appends or renames but writes each object atomically."""
    return "://" in str(path)


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file on the primary so that no reader sees a part of it. Raises OSError without leaving a file."""
    if not distributed.is_primary():
        return
    path = epath.Path(path)
    if on_object_store(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
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


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes `path` atomically. Raises UserError when the file system refuses (no space, no permission)."""
    try:
        write_whole(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; mend that and run the same command to go on") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` atomically as indented JSON. Raises UserError when the file system refuses."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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
