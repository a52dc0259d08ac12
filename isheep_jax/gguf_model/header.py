"""Reads the header of a GGUF file: its metadata and where each tensor lies.

The gguf package maps the file and makes an array object of every token, which takes half a minute for a vocabulary of
262,144; this reads the same bytes in under a second, from anywhere. The format is described in ggml's docs/gguf.md.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from etils import epath

from isheep_jax.errors import UserError, quoted

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
# Types of metadata values by their number in the file; two more are strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4

# What the values of keys must be that are read here; the architecture's name before a key is left out.
_POSITIVE = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "rope.dimension_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    "general.alignment",
)
_COUNTS = (
    *("expert_count", "attention.sliding_window", "split.count"),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")),
)
_REALS = (
    *("attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor"),
)
_TEXTS = (
    *("general.architecture", "general.type", "rope.scaling.type"),
    *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"),
)
_LISTS = {
    "tokenizer.ggml.tokens": str,
    "tokenizer.ggml.merges": str,
    "tokenizer.ggml.scores": int | float,
    "tokenizer.ggml.token_type": int,
}
# Lists with an entry for each token.
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


@dataclass(frozen=True)
class StoredBlock:
    """Where a tensor lies: its shape with rows first, the number of its ggml type, and its first byte."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """The header of a file. size: bytes of the whole file."""

    path: epath.Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredBlock]
    size: int

    def need(self, key: str) -> Any:
        """Returns a value of the metadata. Raises `UserError` when it is missing."""
        if key not in self.metadata:
            raise UserError(f"{self.path} has no {key} in its metadata; convert the model again with a newer llama.cpp")
        return self.metadata[key]


def read_header(path: epath.Path) -> Header:
    """Reads the header of a file.

    Raises `UserError`, naming the file, when it is missing, cut short, damaged or of another kind or version.
    """
    try:
        size = path.stat().length
        with path.open("rb") as file:
            return _read(_Reader(path, file, size))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: a text in its header is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class _Reader:
    """Reads values one after the other. Every length is checked against the file's, so that damage cannot ask for all
    memory."""

    def __init__(self, path: epath.Path, file: BinaryIO, size: int):
        self.path, self.size, self.position = path, size, 0
        self._file = file

    def bytes(self, count: int) -> bytes:
        self.position += count
        data = self._file.read(count) if self.position <= self.size else b""
        if len(data) < count:
            raise UserError(f"{self.path} is cut short or damaged: its header is not whole ({self.size} bytes)")
        return data

    def values(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self.bytes(struct.calcsize(f"<{kinds}")))

    def string(self) -> str:
        return self.bytes(*self.values("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.values(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.values("IQ")
            if element == _STRING:
                self.room_for(count, 8)
                return [self.string() for _ in range(count)]
            if element in _SCALARS:
                self.room_for(count, 1)
                return list(self.values(f"{count}{_SCALARS[element]}"))
        raise UserError(f"{self.path} is damaged: its metadata has a value of the unknown type {kind}")

    def room_for(self, count: int, least: int) -> None:
        """Raises `UserError` when so many things of at least so many bytes cannot follow."""
        if count * least > self.size - self.position:
            raise UserError(f"{self.path} is cut short or damaged: its header announces {count} entries")


def _read(reader: _Reader) -> Header:
    path = reader.path
    if reader.size < 4 or reader.bytes(4) != b"GGUF":
        raise UserError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    (version,) = reader.values("I")
    if version > 0xFFFF:
        raise UserError(f"{path} is a big-endian GGUF file; convert the model again for a little-endian machine")
    if version not in _VERSIONS:
        raise UserError(f"{path} is GGUF version {version}; versions {' and '.join(map(str, _VERSIONS))} are read")
    tensor_count, metadata_count = reader.values("QQ")
    reader.room_for(metadata_count, 13)
    metadata = {}
    for _ in range(metadata_count):
        key = reader.string()
        (kind,) = reader.values("I")
        if key in metadata:
            raise UserError(f"{path} is damaged: its metadata has {quoted(key)} twice")
        metadata[key] = reader.value(kind)
    reader.room_for(tensor_count, 24)
    blocks = {}
    for _ in range(tensor_count):
        name = reader.string()
        (dimensions,) = reader.values("I")
        if dimensions > _MOST_DIMENSIONS:
            raise UserError(f"{path} is damaged: tensor {quoted(name)} has {dimensions} dimensions")
        if name in blocks:
            raise UserError(f"{path} is damaged: it has tensor {quoted(name)} twice")
        shape = reader.values(f"{dimensions}Q")[::-1]
        ggml_type, offset = reader.values("IQ")
        blocks[name] = StoredBlock(name, shape, ggml_type, offset)
    _check_metadata(path, metadata)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if alignment % 8:
        raise UserError(f"{path} is damaged: general.alignment={alignment!r} is not a positive multiple of 8")
    start = math.ceil(reader.position / alignment) * alignment
    tensors = {
        name: StoredBlock(name, block.shape, block.ggml_type, start + block.offset) for name, block in blocks.items()
    }
    return Header(path, metadata, tensors, reader.size)


def _check_metadata(path: epath.Path, metadata: dict[str, Any]) -> None:
    """Raises `UserError` for a value of another type than its key's, or a list of another length than the tokens."""
    prefix = f"{metadata.get('general.architecture')}."
    for key, value in metadata.items():
        name = key.removeprefix(prefix)
        if name in (*_POSITIVE, *_COUNTS):
            right = type(value) is int and value >= (name in _POSITIVE)
        elif name in _REALS:
            right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif name in _TEXTS:
            right = isinstance(value, str)
        elif name in _LISTS:
            right = isinstance(value, list) and all(isinstance(each, _LISTS[name]) for each in value)
        else:
            continue
        if not right:
            raise UserError(f"{path} is damaged or of a kind that is not read: {key} is {quoted(str(value), 40)!r}")
    tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    for key in _PER_TOKEN:
        if len(metadata.get(key, ())) not in (0, tokens):
            raise UserError(f"{path} is damaged: {key} has {len(metadata[key])} entries for {tokens} tokens")
