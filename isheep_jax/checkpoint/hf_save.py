"""Saves weights as Hugging Face directories, tensor by tensor; each process writes its own files."""

import collections
import contextlib
import functools
import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from isheep_jax import distributed
from isheep_jax.checkpoint.file_streams import FileOfTensors, FileStreams
from isheep_jax.checkpoint.hf_config import config_json
from isheep_jax.checkpoint.hf_weights import index_name, single_name, tensor_names
from isheep_jax.errors import UserError
from isheep_jax.files import whole_directory
from isheep_jax.model.architecture import Architecture, ParameterSpec, leaves, parameter_table
from isheep_jax.text.tokenizer import Tokenizer

# Maximum size of an exported weight file (bytes); larger exports have several files and an index. What is dealt to the
# processes are files, so that those of a model of 70 billion parameters are many more than the hosts that it takes.
SHARD_BYTES = 1_000_000_000
# Files that a process writes at once, and tensors that are made ahead.
STREAMS = 4
_MADE_AHEAD = 2


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "sharding"))
def _to_stored(
    leaf: jax.Array, layer: jax.Array, *, spec: ParameterSpec, dtype: np.dtype, sharding: NamedSharding | None
) -> jax.Array:
    """Returns one stored tensor of a leaf.

    Args:
        leaf: the leaf, [L, ...] if stacked.
        layer: index [] of the tensor's layer.
        spec: the leaf's parameter.
        dtype: dtype of the result.
        sharding: sharding of the result; None: as XLA chooses.
    """
    leaf = leaf[layer] if spec.stacked else leaf
    leaf = leaf.reshape(spec.hf_shape[::-1]).T if spec.transposed else leaf.reshape(spec.hf_shape)
    leaf = leaf.astype(dtype)
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def save_checkpoint(
    directory: epath.PathLike,
    params: dict[str, Any],
    architecture: Architecture,
    tokenizer: Tokenizer,
    *,
    dtype: jnp.dtype | None = None,
    card: str | None = None,
) -> dict[str, str]:
    """Writes a new Hugging Face directory atomically; in a bucket, config.json is written last.

    All processes call this, and each writes its share of the weights. Raises `UserError` when the directory exists.

    dtype: dtype of the stored weights (None: that of the parameters).
    card: text of README.md, or None for no file.

    Returns the sha256 of the weight files by name, in the primary.
    """
    stored = jnp.dtype(dtype or params["embed"].dtype)
    with new_checkpoint(directory, architecture, tokenizer, stored, card) as staging:
        return write_tensors(staging, params, parameter_table(architecture), stored)


@contextlib.contextmanager
def new_checkpoint(
    directory: epath.PathLike, architecture: Architecture, tokenizer: Tokenizer, dtype: np.dtype, card: str | None
) -> Iterator[epath.Path]:
    """Yields the path where all processes write the weights of a new Hugging Face directory; see `save_checkpoint`."""
    directory = epath.Path(directory)
    if distributed.is_primary() and directory.exists():
        raise UserError(f"{directory} exists; name a directory that does not")
    with whole_directory(directory) as staging:
        yield staging
        if distributed.is_primary():
            write_small_files(staging, architecture, tokenizer, dtype, card)


def write_small_files(
    directory: epath.Path, architecture: Architecture, tokenizer: Tokenizer, dtype: np.dtype, card: str | None
) -> None:
    """Writes all files of a model but the weights; config.json, which makes it whole, comes last."""
    tokenizer.save(directory)
    token_ids = {"bos_token_id": architecture.bos_token_id, "eos_token_id": list(tokenizer.eos_ids)}
    _write_json(directory / "generation_config.json", token_ids)
    if card is not None:
        note = tokenizer.export_note
        (directory / "README.md").write_text(card if note is None else f"{card}\n{note}\n")
    _write_json(directory / "config.json", config_json(architecture, np.dtype(dtype).name))


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be stored. make: returns it whole, as an array of this process."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], jax.Array]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def write_tensors(
    directory: epath.PathLike,
    params: Any,
    table: Any,
    dtype: jnp.dtype,
    stem: str = "model",
    *,
    single_file: bool = False,
    metadata: Mapping[str, str] = {},
) -> dict[str, str]:
    """Writes a tree of arrays as safetensors files.

    All processes call this. One that does not write a tensor takes part in gathering it on the devices, and goes on.

    Args:
        directory: existing directory.
        params: the arrays.
        table: their `ParameterSpec`s, which give each tensor its name and shape.
        dtype: dtype of the stored tensors.
        stem: start of the file names.
        single_file: writes one file of any size; otherwise several of `SHARD_BYTES` with an index if needed.
        metadata: what the headers of the files say besides.

    Returns the sha256 of each file by name in the primary, once all processes have written theirs.
    """
    dtype = np.dtype(dtype)
    tensors = []
    for path, spec in leaves(table):
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)
        for layer, name in enumerate(tensor_names(spec)):
            make = functools.partial(_gathered, leaf, layer, spec, dtype)
            tensors.append(TensorToWrite(name, spec.hf_shape, make))
    files = [tensors] if single_file else split(tensors, dtype)
    return write_files(directory, files, dtype, stem, metadata=metadata, together=True)


def write_files(
    directory: epath.PathLike,
    files: Sequence[Sequence[TensorToWrite]],
    dtype: np.dtype,
    stem: str = "model",
    *,
    metadata: Mapping[str, str] = {},
    together: bool,
) -> dict[str, str]:
    """Writes safetensors files, which are dealt to the processes; all call this.

    Several files are written at once, and a few tensors of each are on the host at a time.

    Args:
        directory: existing directory.
        files: the tensors of each file, the same in every process.
        dtype: dtype of the tensors.
        stem: start of the file names.
        metadata: what the headers of the files say besides.
        together: whether it takes all processes to make a tensor; otherwise only the one that writes it does.

    Returns the sha256 of each file by name in the primary, once all processes have written theirs.
    """
    directory = epath.Path(directory)
    names = [f"{stem}-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [single_name(stem)]
    written = [
        FileOfTensors(directory / name, {tensor.name: tensor.shape for tensor in file})
        for name, file in zip(names, files)
    ]
    index, count = distributed.process_index(), distributed.process_count()
    # Stream i is the (i // count)-th of process i % count.
    streams = _dealt([sum(tensor.numbers for tensor in file) for file in files], count * STREAMS)
    own = [[written[i] for i in stream] for stream in streams[index::count]]
    made: collections.deque[jax.Array] = collections.deque()
    with FileStreams(own, dtype, metadata) as file_streams:
        for stream, tensor in _in_turns([[tensor for i in stream for tensor in files[i]] for stream in streams]):
            is_own = stream % count == index
            if not (is_own or together):
                continue
            made.append(tensor.make())
            if is_own:
                file_streams.put(stream // count, made[-1])
            # Waiting bounds the memory on the devices.
            if len(made) > _MADE_AHEAD:
                made.popleft().block_until_ready()
    shares = distributed.gather(file_streams.digests)
    if len(files) > 1 and distributed.is_primary():
        weight_map = {tensor.name: name for name, file in zip(names, files) for tensor in file}
        total = sum(tensor.numbers for file in files for tensor in file) * dtype.itemsize
        _write_json(directory / index_name(stem), {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {name: digest for share in shares for name, digest in share.items()}


def split(tensors: Sequence[TensorToWrite], dtype: np.dtype) -> list[list[TensorToWrite]]:
    """Returns the tensors of each file, in their order: at most `SHARD_BYTES` of them, but for a larger tensor."""
    limit = SHARD_BYTES // dtype.itemsize
    files: list[list[TensorToWrite]] = [[]]
    held = 0
    for tensor in tensors:
        if files[-1] and held + tensor.numbers > limit:
            files.append([])
            held = 0
        files[-1].append(tensor)
        held += tensor.numbers
    return files


def _dealt(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deals things to `count` places, each to the one that has the least so far. Returns their indices by place."""
    places: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for i, size in enumerate(sizes):
        place = held.index(min(held))
        places[place].append(i)
        held[place] += size
    return places


def _in_turns(streams: Sequence[Sequence[TensorToWrite]]) -> Iterator[tuple[int, TensorToWrite]]:
    """Yields (index of the stream, tensor), of the stream that has had the least: so that all write all the time."""
    had = [(0, stream) for stream, tensors in enumerate(streams) if tensors]
    rest = [iter(tensors) for tensors in streams]
    while had:
        numbers, stream = heapq.heappop(had)
        if (tensor := next(rest[stream], None)) is not None:
            yield stream, tensor
            heapq.heappush(had, (numbers + tensor.numbers, stream))


def _gathered(leaf: jax.Array, layer: int, spec: ParameterSpec, dtype: np.dtype) -> jax.Array:
    """Returns the stored tensor of a leaf's layer, whole on every device.

    Devices exchange it in milliseconds; only the copies to the host and the writing take time.
    """
    leaf = jnp.asarray(leaf)
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec()) if isinstance(leaf.sharding, NamedSharding) else None
    return _to_stored(leaf, np.int32(layer), spec=spec, dtype=dtype, sharding=whole)


def _write_json(path: epath.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
