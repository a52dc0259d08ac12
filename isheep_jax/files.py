"""Files and directories that are there whole or not at all, on disks and on object stores, written by process 0."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError


def on_object_store(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket, which has no appends and no renames, but puts each object whole."""
    return "://" in str(path)


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file of process 0 so that it is never seen half-written. Raises OSError, and leaves nothing then."""
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
    """Writes `path` whole or not at all. Raises UserError when the file system refuses (no space, no permission)."""
    try:
        write_whole(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; mend that and run the same command to go on") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all. Raises UserError when the file system refuses."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file that a run wrote. Raises UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(epath.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; it should be the JSON file that the run wrote") from error


def read_json_if_there(path: epath.Path) -> Any:
    """Reads a JSON file on process 0 for all processes; None where there is no such file."""
    return distributed.from_primary(lambda: read_json(path) if path.exists() else None)


@contextlib.contextmanager
def whole_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """Where process 0 writes the files of `directory`, which has them when the context ends; what lay there is gone.

    On a disk this is a directory beside it that is renamed. A bucket cannot rename: what is written there is whole when
    a file that is written after it is there, and a later attempt replaces what is not.
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
