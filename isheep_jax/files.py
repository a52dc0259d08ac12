"""Files and directories that are there whole or not at all, on disks and on object stores, written by process 0."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from isheep_jax import distributed


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
