"""Loads Hugging Face weights straight into their shardings."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.checkpoint.kept_rows import KeptRows
from isheep_jax.checkpoint.safetensors_file import DTYPES, StoredTensor, read_header
from isheep_jax.errors import UserError, quoted
from isheep_jax.files import reader_threads
from isheep_jax.gguf_model.files import is_gguf
from isheep_jax.gguf_model.tensors import GGUFTensor, stored_tensors
from isheep_jax.model.architecture import Architecture, ParameterSpec, leaves, parameter_table
from isheep_jax.model.quantization import StorageDtype, quantize
from isheep_jax.sharding import AXES, ShardingRules, partition
from isheep_jax.text.json_files import read_json_object

Tensor = StoredTensor | GGUFTensor

# RoPE frequencies, which old checkpoints have and config.json says.
_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")
# Beside tied embeddings it may only be a copy of them, see `_check_head`.
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Numbers of two tensors that are compared at a time.
_COMPARED = 4 * 2**20
# Most bytes of a read: larger parts of a tensor are read by several threads.
_READ_BYTES = 64 * 2**20


def find_tensors(directory: epath.PathLike, architecture: Architecture) -> dict[str, Tensor]:
    """Finds every tensor of the architecture in a Hugging Face directory or GGUF file, reading only the file headers.

    With tied embeddings the lm_head is among them if there is one, for `_check_head`.
    Raises `UserError`, naming tensor and file, when a tensor is missing, has another shape or dtype or belongs to no
    parameter, or when a file is missing, truncated or damaged.
    """
    directory = epath.Path(directory)
    source, stored = _stored_tensors(directory)
    expected = {}
    for _, spec in leaves(parameter_table(architecture)):
        expected |= {tensor.name: tensor for tensor in tensors_of(source, stored, spec)}
    if _HEAD in stored and _HEAD not in expected:
        expected[_HEAD] = _checked(stored[_HEAD], expected[_EMBEDDINGS].shape)
    for name in sorted(stored.keys() - expected.keys()):
        if not _FREQUENCIES.search(name):
            raise UserError(
                f"{stored[name].path}: tensor {quoted(name)} belongs to no parameter of a "
                f"{architecture.traits.class_name} as config.json describes it"
            )
    return expected


def tensors_of(source: epath.Path, stored: Mapping[str, Tensor], spec: ParameterSpec) -> list[Tensor]:
    """Returns the tensors of a parameter, by layer. source: the file that says which there are, for messages.

    Raises `UserError` as `find_tensors`.
    """
    names = tensor_names(spec)
    if missing := [name for name in names if name not in stored]:
        raise UserError(f"{source}: tensor {missing[0]} is missing")
    return [_checked(stored[name], spec.hf_shape) for name in names]


def read_whole(tensor: Tensor) -> np.ndarray:
    """Returns all of a tensor's numbers."""
    with ThreadPoolExecutor(reader_threads(tensor.path)) as threads:
        (part,) = _read_rows([tensor], [(0, tensor.shape[0])], tensor.shape[1:], tensor.dtype, threads).values()
    return part[0]


def _checked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor that can be read and has this shape. Raises `UserError` for any other."""
    if tensor.dtype_name not in DTYPES:
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} is stored as {quoted(tensor.dtype_name)}; only {', '.join(DTYPES)} "
            "are read"
        )
    if tensor.shape != shape:
        raise UserError(f"{tensor.path}: tensor {tensor.name} has shape {tensor.shape}; config.json asks for {shape}")
    return tensor


def _stored_tensors(directory: epath.Path) -> tuple[epath.Path, dict[str, Tensor]]:
    """Returns the tensors by name, after the file that says which there are."""
    single, index = directory / single_name("model"), directory / index_name("model")
    if is_gguf(directory):
        return directory, stored_tensors(directory)
    shards = sorted(path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name))
    if index.exists():
        stored = _indexed(directory, index)
        used = {tensor.path.name for tensor in stored.values()}
        if unused := [name for name in [single.name, *shards] if name not in used and (directory / name).exists()]:
            raise UserError(f"{directory / unused[0]} is not in {index.name}; only one of them can be meant")
        return index, stored
    if single.exists():
        if shards:
            raise UserError(f"{directory / shards[0]} lies beside {single.name}; only one of them can be meant")
        return single, read_header(single)
    others = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    hint = f"there is neither {single.name} nor {index.name}"
    if others:
        hint = f"only {others[0]}, a pickle file, which could run any code and is never read; convert it to safetensors"
    elif others := sorted(path.name for path in directory.glob("*.safetensors")):
        is_lost = single.name in others
        hint = f"{single.name} is a link to a file that is missing" if is_lost else f"{hint}, only {quoted(others[0])}"
    raise UserError(f"{directory} holds no weights that can be read: {hint}")


def _indexed(directory: epath.Path, index: epath.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of the files that an index names. Raises `UserError` unless both know of the same tensors."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index} is not a safetensors index: it needs a weight_map from tensors to files")
    stored: dict[str, StoredTensor] = {}
    files = sorted(set(places.values()))
    for file in files:
        if not _FILE_NAME.fullmatch(file):
            raise UserError(f"{index}: {quoted(file)} is not the name of a safetensors file in the same directory")
    with ThreadPoolExecutor(reader_threads(directory)) as threads:
        headers = list(threads.map(lambda file: read_header(directory / file), files))
    for file, tensors in zip(files, headers):
        if twice := sorted(tensors.keys() & stored.keys()):
            other = stored[twice[0]].path.name
            raise UserError(f"{directory / file}: tensor {quoted(twice[0])} is in {other}, too; only one can be meant")
        stored |= tensors
    for name, file in places.items():
        if name not in stored or stored[name].path.name != file:
            raise UserError(
                f"{directory / file}: tensor {quoted(name)} is missing, but {index.name} says that it is there"
            )
    for name in sorted(stored.keys() - places.keys()):
        if not _FREQUENCIES.search(name):
            file = stored[name].path.name
            raise UserError(f"{index}: tensor {quoted(name)}, which {file} has, is missing in the weight_map")
    return stored


def load_parameters(
    directory: epath.PathLike,
    architecture: Architecture,
    *,
    mesh: Mesh,
    rules: ShardingRules,
    dtype: jnp.dtype,
    weights_dtype: StorageDtype = "model",
    tensors: Mapping[str, Tensor] | None = None,
    change: Callable[[str, ParameterSpec, jax.Array], jax.Array] | None = None,
    kept: KeptRows | None = None,
) -> dict[str, Any]:
    """Loads the parameters of a Hugging Face directory or a GGUF file.

    Works leaf by leaf. Each host reads its devices' equal shares of the rows of a leaf's tensors, in the layout of the
    files, and the devices then exchange them into the final layout. Every byte is read once, neighboring rows of
    several devices together, whatever the rules split; and neither host nor device holds more than two copies of a
    leaf.

    Args:
        directory: what holds config.json and the weight files, or the GGUF file.
        architecture: what config.json describes.
        mesh, rules: devices, and how the leaves' axes are split over them.
        dtype: dtype of the loaded weights.
        weights_dtype: "int8" turns each matrix into a `Quantized` at once, so that the float weights are never all in
            memory.
        tensors: what `find_tensors` returned, if it was called before.
        change: called with the name, the parameter and the array of each leaf, which it returns or replaces, before
            that is turned into int8.
        kept: keeps what is read, and has what was read before.

    Raises as `find_tensors`, and when a tensor has numbers that are not finite.
    """
    directory = epath.Path(directory)
    tensors = find_tensors(directory, architecture) if tensors is None else tensors
    if architecture.tied_embeddings and _HEAD in tensors:
        _check_head(tensors[_HEAD], tensors[_EMBEDDINGS])
    specs, tree = jax.tree.flatten_with_path(parameter_table(architecture))
    loaded: list[jax.Array | None] = [None] * len(specs)
    # The largest leaf first, while there is memory for the copies that the exchange needs.
    order = sorted(range(len(specs)), key=lambda i: -math.prod(specs[i][1].shape))
    with ThreadPoolExecutor(reader_threads(directory)) as threads:
        for i in order:
            path, spec = specs[i]
            stored = [tensors[name] for name in tensor_names(spec)]
            leaf = load_leaf(stored, spec, mesh=mesh, rules=rules, dtype=dtype, threads=threads, kept=kept)
            if change is not None:
                leaf = change(path[-1].key, spec, leaf)
            if weights_dtype == "int8" and spec.is_matrix:
                leaf = quantize(leaf, spec.input_axes)
            # Waiting bounds the memory: otherwise reading would run ahead of the devices.
            loaded[i] = jax.block_until_ready(leaf)
    return jax.tree.unflatten(tree, loaded)


def load_leaf(
    stored: Sequence[Tensor],
    spec: ParameterSpec,
    *,
    mesh: Mesh,
    rules: ShardingRules,
    dtype: jnp.dtype,
    threads: ThreadPoolExecutor,
    kept: KeptRows | None = None,
) -> jax.Array:
    """Returns one leaf from its tensors, by layer; see `load_parameters`. threads: what reads."""
    sharding = NamedSharding(mesh, partition(spec.axes, rules))
    leaf = _read_stored(stored, spec, sharding, threads, kept or KeptRows(0))
    leaf, finite, empty = _from_stored(spec, jnp.dtype(dtype), leaf.sharding, sharding)(leaf)
    _check_finite(stored, np.asarray(finite))
    if stored[0].name == _EMBEDDINGS and np.asarray(empty):
        # What a download that was interrupted leaves where the file was made in its full size.
        raise UserError(
            f"{stored[0].path}: tensor {_EMBEDDINGS} has zeros only: the file is not complete; get it again"
        )
    return leaf


def _check_head(head: Tensor, embeddings: Tensor) -> None:
    """Raises `UserError` unless a stored lm_head that config.json ties to the embeddings is the same as they."""
    rows, width = head.shape
    step = max(1, _COMPARED // width)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        parts = []
        for tensor in (head, embeddings):
            parts.append(np.empty((count, width), tensor.dtype))
            tensor.read_rows(start, start + count, parts[-1])
        if not np.array_equal(*parts):
            raise UserError(
                f"{head.path}: {_HEAD} is not the same as {_EMBEDDINGS}, but config.json says tie_word_embeddings=true;"
                " set it to false if the head is to be used, or remove the head"
            )


def _check_finite(tensors: list[Tensor], finite: np.ndarray) -> None:
    """Raises `UserError` that names the first tensor with a number that is not finite. finite: by tensor."""
    if not finite.all():
        tensor = tensors[int(np.argmin(finite))]
        raise UserError(
            f"{tensor.path}: tensor {tensor.name} has numbers that are not finite (NaN or infinity), so that all that "
            "the model computes would be; take an undamaged copy, or an earlier state of the training that made it"
        )


def _read_stored(
    tensors: Sequence[Tensor],
    spec: ParameterSpec,
    final: NamedSharding,
    threads: ThreadPoolExecutor,
    kept: KeptRows,
) -> jax.Array:
    """Reads a leaf in its stored layout, [L, *hf_shape] or hf_shape if not stacked, with its rows split over the mesh.

    Args:
        tensors: the leaf's tensors, by layer.
        spec: the leaf's parameter.
        final: the sharding that the leaf will have.
        threads: what reads the tensors, several at a time.
        kept: keeps what is read.
    """
    rows, mesh = spec.hf_shape[0], final.mesh
    # The rows are split over as many devices as divide them; the other devices hold copies. The axis that the rows stay
    # split over comes first and axes that repeat the leaf last, so that devices exchange parts, never the whole.
    row_axis = (
        next(i for i in range(len(spec.shape)) if math.prod(spec.shape[i:]) == rows)
        if spec.transposed
        else int(spec.stacked)
    )
    order = sorted(AXES, key=lambda axis: (axis != final.spec[row_axis], axis not in final.spec))
    choices = itertools.chain.from_iterable(itertools.combinations(order, n) for n in range(len(order) + 1))
    sizes = {axes: math.prod(mesh.shape[axis] for axis in axes) for axes in choices}
    axes = max((axes for axes, size in sizes.items() if rows % size == 0), key=sizes.get)
    dtype = functools.reduce(jnp.promote_types, (tensor.dtype for tensor in tensors))

    shape = (len(tensors), *spec.hf_shape) if spec.stacked else spec.hf_shape
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * spec.stacked, axes))

    def extent(index: tuple[slice, ...]) -> tuple[int, int]:
        """Returns the first row of a device's part, and the row after its last."""
        return index[spec.stacked].indices(rows)[:2]

    # Some devices hold the same rows.
    extents = sorted({extent(index) for index in sharding.addressable_devices_indices_map(shape).values()})
    parts = kept.rows(
        (str(tensors[0].path), tensors[0].name, *extents),
        lambda: _read_rows(tensors, extents, spec.hf_shape[1:], dtype, threads),
    )
    return jax.make_array_from_callback(
        shape, sharding, lambda index: parts[extent(index)] if spec.stacked else parts[extent(index)][0]
    )


def _read_rows(
    tensors: Sequence[Tensor],
    extents: Sequence[tuple[int, int]],
    row: tuple[int, ...],
    dtype: np.dtype,
    threads: ThreadPoolExecutor,
) -> dict[tuple[int, int], np.ndarray]:
    """Returns some rows of each tensor, [layers, rows, ...], by their extent (first row, row after the last).

    Args:
        tensors: the tensors, by layer.
        extents: which rows, in their order; no two have a row in common.
        row: shape of a row.
        dtype: dtype of the result.
        threads: what reads, several ranges at a time.
    """
    parts = {(a, b): np.empty((len(tensors), b - a, *row), dtype) for a, b in extents}

    def read(layer: int, start: int, stop: int) -> None:
        inside = [(max(a, start), min(b, stop), a, part[layer]) for (a, b), part in parts.items()]
        inside = [(first, last, part[first - a : last - a]) for first, last, a, part in inside if first < last]
        if len(inside) == 1 and tensors[layer].dtype == dtype:
            tensors[layer].read_rows(start, stop, inside[0][2])
            return
        together = np.empty((stop - start, *row), tensors[layer].dtype)
        tensors[layer].read_rows(start, stop, together)
        for first, last, part in inside:
            part[...] = together[first - start : last - start]

    step = max(1, _READ_BYTES // (math.prod(row) * dtype.itemsize))
    ranges = [
        (layer, start, min(start + step, last))
        for first, last in _joined(extents)
        for layer in range(len(tensors))
        for start in range(first, last, step)
    ]
    list(threads.map(read, *zip(*ranges)))
    return parts


def _joined(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the extents, which are in order, with neighbors as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in extents:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


@functools.lru_cache(maxsize=256)
def _from_stored(spec: ParameterSpec, dtype: jnp.dtype, stored: NamedSharding, sharding: NamedSharding):
    """Returns the program that brings a leaf from its stored layout into its final one.

    It also returns whether all numbers are finite, of each layer if the leaf is stacked, and whether all are zero.

    Args:
        spec: the leaf's parameter.
        dtype: dtype of the result.
        stored: sharding of the stored layout, of which at most the rows are split.
        sharding: sharding of the result.
    """
    # In a single step XLA would gather the whole leaf on every device. Copies are made first, then parts exchanged.
    rows = stored.spec[spec.stacked] or ()
    rows = (rows,) if isinstance(rows, str) else rows
    kept = tuple(axis for axis in rows if axis in sharding.spec)
    copied = NamedSharding(sharding.mesh, PartitionSpec(*[None] * spec.stacked, kept))

    def arrange(leaf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        leaf = jax.lax.with_sharding_constraint(leaf, copied)
        leaf = (leaf.swapaxes(-1, -2) if spec.transposed else leaf).reshape(spec.shape).astype(dtype)
        return leaf, jnp.all(jnp.isfinite(leaf), axis=range(int(spec.stacked), leaf.ndim)), ~jnp.any(leaf)

    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(arrange, out_shardings=(sharding, everywhere, everywhere))


def tensor_names(spec: ParameterSpec) -> list[str]:
    """Returns the names of a leaf's tensors, by layer."""
    return [spec.hf_name.format(layer=layer) for layer in range(spec.shape[0])] if spec.stacked else [spec.hf_name]


def single_name(stem: str) -> str:
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"
