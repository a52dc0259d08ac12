"""Writes several safetensors files at once, from tensors that come one after another in the order of all files.

One stream does not saturate a disk or a bucket, and a device waits for neither: the tensors are copied to the host by
one thread and written, and hashed, by one thread per stream.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from isheep_jax.checkpoint.safetensors_file import write_file

# Tensors that wait for a stream, besides the one that it writes, and tensors that wait on the devices.
_AHEAD, _AHEAD_ON_DEVICES = 1, 2


@dataclass(frozen=True)
class FileOfTensors:
    """A file to be written: its path, and the shapes of its tensors by name."""

    path: epath.Path
    shapes: dict[str, tuple[int, ...]]


class FileStreams:
    """The files that one process writes, some at a time; a context manager that ends when all are written.

    Memory on the host: three tensors per stream. An error of a stream is raised by the next `put`, or at the end.
    """

    def __init__(
        self,
        streams: Sequence[Sequence[FileOfTensors]],
        dtype: np.dtype,
        metadata: Mapping[str, str] = {},
    ):
        """Opens the streams.

        streams: the files of each stream, in the order in which it writes them. dtype: of all tensors. metadata: what
        the headers say besides.
        """
        self.digests: dict[str, str] = {}  # sha256 by file name, of the files that are written
        self._dtype, self._metadata = dtype, metadata
        self._writers = [_Worker(lambda items, files=files: self._write(files, items), _AHEAD) for files in streams]
        self._copier = _Worker(self._copy, _AHEAD_ON_DEVICES)

    def put(self, stream: int, tensor: jax.Array) -> None:
        """Hands over the next tensor of a stream, which this process holds whole."""
        self._copier.put((stream, tensor))

    def __enter__(self) -> "FileStreams":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        workers = [self._copier, *self._writers]
        for worker in workers:
            worker.finish(abandoned=kind is not None)
        if kind is None:
            for worker in workers:
                worker.check()

    def _copy(self, items: Iterator[tuple[int, jax.Array]]) -> None:
        for stream, tensor in items:
            self._writers[stream].put(np.asarray(tensor.addressable_data(0)))

    def _write(self, files: Sequence[FileOfTensors], items: Iterator[np.ndarray]) -> None:
        for file in files:
            tensors = (next(items) for _ in file.shapes)
            self.digests[file.path.name] = write_file(file.path, file.shapes, self._dtype, tensors, self._metadata)


class _Abandoned(Exception):
    """What ends a worker's work when its items will never come."""


class _Worker:
    """A thread that works through what it is given."""

    def __init__(self, work: Callable[[Iterator[Any]], None], ahead: int):
        """work: takes the items. ahead: items that may wait; `put` waits while there are more."""
        self._items: queue.Queue = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def put(self, item: Any) -> None:
        """Hands over an item. Raises the error of the work, if it has ended with one."""
        self.check()
        self._items.put((item, None))

    def finish(self, *, abandoned: bool) -> None:
        """Waits until the work has ended. abandoned: it ends at once, with items missing."""
        self._items.put((None, _Abandoned() if abandoned else StopIteration()))
        self._thread.join()

    def check(self) -> None:
        """Raises the error that the work has ended with, if there is one."""
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[Iterator[Any]], None]) -> None:
        try:
            work(self._take())
        except BaseException as error:
            self._error = error
        # So that nobody waits to hand over more.
        while not self._ended:
            self._ended = self._items.get()[1] is not None

    def _take(self) -> Iterator[Any]:
        while not self._ended:
            item, end = self._items.get()
            self._ended = end is not None
            if isinstance(end, _Abandoned):
                raise end
            if end is None:
                yield item
