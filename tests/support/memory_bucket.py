"""A bucket in memory, so that tests use gs:// paths without a network."""

import itertools

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

_COUNT = itertools.count()


class _Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012 (the base class's attribute; its own is shared with memory://)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://", 1))


def memory_bucket(monkeypatch) -> epath.Path:
    """Returns an empty gs:// directory that lasts for the rest of the process."""
    monkeypatch.setenv("EPATH_USE_TF", "false")  # TensorFlow's file systems take precedence if it is installed
    fsspec.register_implementation("gcs", _Bucket, clobber=True)
    path = epath.Path(f"gs://memory-{next(_COUNT)}/models")
    path.mkdir(parents=True)
    return path
