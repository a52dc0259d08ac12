"""Reads headers and byte ranges of safetensors files and writes files tensor by tensor, on disks and in buckets.

The safetensors library maps local files into memory and writes files from tensors that are all in memory. This module
reads parts of tensors from anywhere without mapping, and writes with one tensor in memory at a time. A file consists of
eight bytes with the length of a JSON header, the header, and the bytes of the tensors.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from isheep_jax.errors import UserError, one_line, quoted
from isheep_jax.files import read_range
from isheep_jax.text_files import parse_json

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A larger header size means a damaged file: the header of a model with a thousand tensors takes 100 KB.
_MAX_HEADER = 25_000_000
# Bytes that are read at once, so that a file of a large model takes one request in a bucket.
_USUAL_HEADER = 64 * 2**10
# What a file begins with of which a clone has only the place, where a header's length would be.
_LFS_POINTER = b"version "
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the offset of its first byte, the format's name of its dtype, and its shape."""

    path: epath.Path
    name: str
    offset: int
    dtype_name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.dtype_name]

    def read_rows(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows start to stop - 1 (of the first axis) into `out`, a contiguous array of their shape and dtype.

        Raises `UserError`, naming tensor and file, when they cannot be read.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        target = memoryview(out.reshape(-1).view(np.uint8))
        try:
            if read_range(self.path, self.offset + start * row, target) < len(target):
                raise UserError(f"{self.path} ends within tensor {self.name}; it is truncated")
        except OSError as error:
            raise UserError(f"{self.path}: tensor {self.name} cannot be read: {error.strerror or error}") from None


def read_header(path: epath.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file by name. Raises as `read_header_and_metadata`."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: epath.Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of a file by name, and what else its header says.

    Raises `UserError`, naming the file and any tensor at fault, when the file is missing, damaged or truncated, and
    when a byte of it belongs to two tensors or to none.
    """
    try:
        size = path.stat().length
        if size < 8:  # also a pipe, which would be waited for
            raise UserError(f"{path} is truncated or not a safetensors file: it has {size} bytes")
        beginning = _read(path, 0, min(size, _USUAL_HEADER))
        if beginning.startswith(_LFS_POINTER):
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself; `git lfs pull` fetches that")
        length = int.from_bytes(beginning[:8], "little")
        if length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{path} is truncated or not a safetensors file: its header is not whole")
        text = beginning[8 : 8 + length]
        text += _read(path, len(beginning), 8 + length - len(beginning)) if len(text) < length else b""
        header = parse_json(text.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:  # includes those of UTF-8
        raise UserError(
            f"{path} is not a safetensors file: its header is not JSON ({quoted(one_line(error))})"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is not a JSON object")
    data = 8 + length
    tensors = {name: _stored(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}
    _check_extents(
        path, [(*entry["data_offsets"], name) for name, entry in header.items() if name in tensors], size - data
    )
    metadata = header.get("__metadata__")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _read(path: epath.Path, start: int, count: int) -> bytes:
    """Returns the bytes of a file from `start` on, at most `count`."""
    data = bytearray(count)
    return bytes(data[: read_range(path, start, memoryview(data))])


def _stored(path: epath.Path, name: str, entry: Any, data: int) -> StoredTensor:
    """Returns the tensor that an entry of the header describes. data: the offset of the first tensor's first byte."""
    try:
        (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        numbers = [start, stop, *shape]
        well_formed = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        numbers, well_formed = [], False
    if not well_formed or not all(type(number) is int and number >= 0 for number in numbers) or stop < start:
        raise UserError(f"{path}: the header's entry of tensor {quoted(name)} is malformed")
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(
            f"{path}: tensor {quoted(name)} has {stop - start} bytes, which is not what {dtype} {tuple(shape)} takes"
        )
    return StoredTensor(path, name, data + start, dtype, tuple(shape))


def _check_extents(path: epath.Path, extents: list[tuple[int, int, str]], size: int) -> None:
    """Raises `UserError` unless the tensors fill the bytes after the header, one after the other.

    extents: first byte, byte after the last and name of each. size: number of those bytes.
    """
    end, before = 0, "the header"
    for start, stop, name in sorted(extents):
        if stop > size:
            raise UserError(
                f"{path} is truncated: tensor {quoted(name)} ends {stop} bytes after the header, the file {size} bytes"
            )
        if start != end:
            what = "overlaps" if start < end else f"leaves {start - end} bytes between itself and"
            raise UserError(f"{path} is damaged: tensor {quoted(name)} {what} {quoted(before)}")
        end, before = stop, f"tensor {name}"
    if end < size:
        raise UserError(f"{path} is damaged: {size - end} bytes after {quoted(before)} belong to no tensor")


def write_file(
    path: epath.Path,
    entries: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    data: Iterable[np.ndarray],
    metadata: Mapping[str, str] = {},
) -> str:
    """Writes a file of tensors. Returns its sha256, so that nobody has to read it again for that.

    Args:
        path: the file.
        entries: shapes by name.
        dtype: dtype of all tensors.
        data: the tensors in the order of `entries`, consumed one at a time.
        metadata: what else the header says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for name, offsets in zip(entries, _extents(entries.values(), dtype)):
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(entries[name]), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(part: bytes | memoryview) -> None:
            digest.update(part)
            file.write(part)

        write(len(text).to_bytes(8, "little") + text)
        for (name, shape), tensor in zip(entries.items(), data, strict=True):
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tensor.dtype} {tensor.shape} instead of {dtype} {shape}")
            write(memoryview(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)))
    return digest.hexdigest()


def _extents(shapes: Iterable[tuple[int, ...]], dtype: np.dtype) -> Iterator[list[int]]:
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape) * np.dtype(dtype).itemsize
        yield [start, stop]
        start = stop
