"""A bucket in memory, so that tests use gs:// paths without a network."""

import itertools

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

_COUNT = itertools.count()


class _Bucket(MemoryFileSystem):
    """Counts what a bucket is asked over the network: `requests` are (kind, path, first byte, byte after the last)."""

    protocol = ("gs", "gcs")
    requests = []  # noqa: RUF012
    store = {}  # noqa: RUF012 (the base class's attribute; its own is shared with memory://)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://", 1))

    def info(self, path, **kwargs):
        self.requests.append(("info", self._strip_protocol(path), None, None))
        return super().info(path, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        self.requests.append((f"open {mode}", path, None, None))
        return super()._open(path, mode, **kwargs)

    def cat_file(self, path, start=None, end=None, **_):
        path = self._strip_protocol(path)
        self.requests.append(("range", path, start, end))
        if path not in self.store:
            raise FileNotFoundError(path)
        return self.store[path].getvalue()[start:end]


def requests_of(function) -> list[tuple]:
    """Returns what buckets were asked while a function ran."""
    before = len(_Bucket.requests)
    function()
    return _Bucket.requests[before:]


def memory_bucket(monkeypatch) -> epath.Path:
    """Returns an empty gs:// directory that lasts for the rest of the process."""
    monkeypatch.setenv("EPATH_USE_TF", "false")  # TensorFlow's file systems take precedence if it is installed
    fsspec.register_implementation("gcs", _Bucket, clobber=True)
    path = epath.Path(f"gs://memory-{next(_COUNT)}/models")
    path.mkdir(parents=True)
    return path
