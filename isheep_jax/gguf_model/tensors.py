"""The tensors of a GGUF file under their Hugging Face names, dequantized and reordered as they are read."""

import functools
import math
import re
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from isheep_jax.errors import UserError, quoted
from isheep_jax.files import read_range
from isheep_jax.gguf_model.architectures import Stored, architecture_of
from isheep_jax.gguf_model.header import Header, StoredBlock, read_header

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NOT_PARAMETERS = ("rope_freqs.weight",)  # `config_json` reads it
# Numbers that are dequantized at a time: several copies of them are in memory.
_NUMBERS = 4 * 2**20


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file, float32 to its readers.

    shape: as Hugging Face stores it. quantization: ggml's name of how it is stored. offset, row_bytes: its first byte,
    and the bytes of a row. head_dim: rows of a head whose order is to be undone; None: the order is right. added: what
    was added to the weights.
    """

    path: epath.Path
    name: str
    shape: tuple[int, ...]
    quantization: str
    offset: int
    row_bytes: int
    head_dim: int | None = None
    added: float = 0.0

    dtype_name = "F32"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read_rows(self, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows start to stop - 1 (of the first axis) into `out`, a float32 array of their shape.

        Raises `UserError`, naming tensor and file, when they cannot be read.
        """
        step = max(1, _NUMBERS // math.prod(self.shape[1:]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._rows(first, last)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        if self.head_dim is None:
            return self._stored_rows(start, stop) - self.added
        # Row (head, half, i) of Hugging Face is row (head, i, half) of the file.
        head = self.head_dim
        begin, end = start // head * head, math.ceil(stop / head) * head
        rows = np.arange(begin, end).reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1)
        return self._stored_rows(begin, end)[rows[start - begin : stop - begin] - begin]

    def _stored_rows(self, start: int, stop: int) -> np.ndarray:
        gguf = gguf_package()
        count = (stop - start) * self.row_bytes
        data = np.empty(count, np.uint8)
        try:
            if read_range(self.path, self.offset + start * self.row_bytes, memoryview(data)) < count:
                raise UserError(f"{self.path} ends within tensor {self.name}; it is cut short")
        except OSError as error:
            raise UserError(f"{self.path}: tensor {self.name} cannot be read: {error.strerror or error}") from None
        stored = data.reshape(stop - start, self.row_bytes)
        values = gguf.dequantize(stored, gguf.GGMLQuantizationType[self.quantization])
        return values.reshape(stop - start, *self.shape[1:])


def stored_tensors(path: epath.Path) -> dict[str, GGUFTensor]:
    """Returns the tensors of a file by Hugging Face name; one that no rule names keeps its own.

    Raises `UserError`, one line that names the file, when it is cut short or damaged, or has an unknown architecture or
    quantization.
    """
    header = read_header(path)
    _, stored = architecture_of(header)
    tensors: dict[str, GGUFTensor] = {}
    end = 0
    for block in sorted(header.tensors.values(), key=lambda block: block.offset):
        tensor = stored_tensor(header, block.name, stored)
        if tensor.offset < end:
            raise UserError(f"{path} is damaged: tensor {quoted(block.name)} overlaps the one before it")
        end = tensor.offset + tensor.row_bytes * tensor.shape[0]
        if tensor.name in tensors:
            raise UserError(f"{path} has tensor {quoted(tensor.name)} under two names, of which one can be meant")
        if block.name not in _NOT_PARAMETERS:
            tensors[tensor.name] = tensor
    return tensors


def stored_tensor(header: Header, name: str, stored: Stored | None = None) -> GGUFTensor:
    """Returns one tensor by its name in the file.

    stored: what to undo and how it is named; None: read it as it is.
    Raises `UserError` as `stored_tensors`.
    """
    block = header.tensors[name]
    quantization, row_bytes = _layout(header, block)
    end = block.offset + row_bytes * block.shape[0]
    if end > header.size:
        raise UserError(
            f"{header.path} is cut short: tensor {quoted(name)} ends at byte {end}, the file at byte {header.size}"
        )
    tensor = GGUFTensor(header.path, name, block.shape, quantization, block.offset, row_bytes)
    return tensor if stored is None else _translated(header, tensor, stored)


def _translated(header: Header, tensor: GGUFTensor, stored: Stored) -> GGUFTensor:
    """Returns a tensor under its Hugging Face name, with what llama.cpp did to its values to be undone."""
    base, _, kind = tensor.name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
    leaf = match[2] if match else base
    if match and leaf in stored.layer:
        name = f"model.layers.{match[1]}.{stored.layer[leaf]}.{kind}"
    elif base in _WHOLE:
        name = f"{_WHOLE[base]}.{kind}"
    else:
        return tensor
    head_dim = None
    if stored.permuted and leaf in ("attn_q", "attn_k"):
        heads = header.need("llama.attention.head_count")
        if leaf == "attn_k":
            heads = header.metadata.get("llama.attention.head_count_kv", heads)
        head_dim, rest = divmod(tensor.shape[0], heads)
        if rest or head_dim % 2:
            raise UserError(
                f"{header.path}: tensor {quoted(tensor.name)} of {tensor.shape[0]} rows is not that of {heads} heads"
            )
    return replace(tensor, name=name, head_dim=head_dim, added=stored.norm_offset if leaf.endswith("norm") else 0.0)


def _layout(header: Header, block: StoredBlock) -> tuple[str, int]:
    """Returns the name of a tensor's quantization, and the bytes of a row."""
    gguf = gguf_package()
    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    kind = known.get(block.ggml_type)
    if kind is None or not _is_readable(kind):
        name = kind.name if kind else f"number {block.ggml_type}"
        raise UserError(
            f"{header.path}: tensor {quoted(block.name)} is stored as ggml type {name}, which the installed gguf "
            "package cannot dequantize; take a file of another quantization, such as Q8_0 or Q4_K_M"
        )
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    columns = math.prod(block.shape[1:])
    if not block.shape or not all(block.shape) or columns % numbers:
        raise UserError(
            f"{header.path} is damaged: tensor {quoted(block.name)} of shape {block.shape} cannot be {kind.name}"
        )
    return kind.name, columns // numbers * size


@functools.cache
def _is_readable(kind: "GGMLQuantizationType") -> bool:
    """Returns whether the package dequantizes a type; it says so only when asked to."""
    gguf = gguf_package()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def gguf_package() -> ModuleType:
    """Returns the gguf package. Raises `UserError`, naming what to install, where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError('a GGUF file needs the gguf package: pip install "isheep_jax[gguf]"') from None
    return gguf
