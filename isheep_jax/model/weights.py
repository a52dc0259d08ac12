"""Hugging Face safetensors straight into their shardings, and out again, tensor by tensor."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # registers bfloat16 with numpy, which the safetensors reader needs
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, ParameterSpec, leaves, parameter_table
from isheep_jax.model.config_json import config_json
from isheep_jax.model.tokenizer import Tokenizer
from isheep_jax.sharding import Rules, partition

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 4_500_000_000
_STORED = ("F32", "F16", "BF16")
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load_parameters(
    directory: Path, architecture: Architecture, *, mesh: Mesh, rules: Rules, dtype: jnp.dtype
) -> dict[str, Any]:
    """The parameters of a Hugging Face directory as `dtype`, sharded over `mesh` by `rules`.

    Each device's part is read from the byte ranges it needs, one leaf at a time. Raises `UserError` that names tensor
    and file when a tensor is missing, has another shape, or its file is damaged.
    """
    reader = _Reader(Path(directory))

    def load(spec: ParameterSpec) -> jax.Array:
        sharding = NamedSharding(mesh, partition(spec, rules))
        return jax.make_array_from_callback(
            spec.shape, sharding, lambda index: _read_part(reader, spec, index).astype(dtype)
        )

    return jax.tree.map(load, parameter_table(architecture))


class _Reader:
    """Finds tensors in the directory's safetensors files."""

    def __init__(self, directory: Path):
        self._directory = directory
        index = directory / _INDEX
        if index.exists():
            try:
                self._files = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError):  # not JSON, no weight_map, or one that is no object
                raise UserError(f"{index} is not a safetensors index: it needs a weight_map") from None
        elif (directory / _SINGLE).exists():
            self._files = None
        else:
            raise UserError(f"{directory} holds no weights: neither {_SINGLE} nor {_INDEX} is there")
        self._open: dict[str, Any] = {}

    def slice(self, name: str, shape: tuple[int, ...]):
        """A lazy slice of tensor `name`, which must have `shape`."""
        file = _SINGLE if self._files is None else self._files.get(name)
        if file is None:
            raise UserError(f"{self._directory / _INDEX}: tensor {name} is missing")
        path = self._directory / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="numpy")
            part = self._open[file].get_slice(name)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; the index says that it holds tensor {name}") from None
        except SafetensorError as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None
        if part.get_dtype() not in _STORED:
            raise UserError(
                f"{path}: tensor {name} is stored as {part.get_dtype()}; only {', '.join(_STORED)} are read"
            )
        if tuple(part.get_shape()) != shape:
            raise UserError(f"{path}: tensor {name} has shape {tuple(part.get_shape())}; config.json asks for {shape}")
        return part


def _read_part(reader: _Reader, spec: ParameterSpec, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of a leaf."""
    bounds = [s.indices(size)[:2] for s, size in zip(index, spec.shape)]
    if not spec.stacked:
        return _read_matrix(reader.slice(spec.hf_name, spec.hf_shape), spec, spec.shape, bounds)
    layers = [
        _read_matrix(reader.slice(spec.hf_name.format(layer=layer), spec.hf_shape), spec, spec.shape[1:], bounds[1:])
        for layer in range(*bounds[0])
    ]
    return np.stack(layers)


def _read_matrix(source, spec: ParameterSpec, shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> np.ndarray:
    """The part of one tensor that `bounds` names in our shape."""
    # Our axes are the stored ones split up: [inputs..., outputs...] against [outputs, inputs]. Within each group only
    # the first axis is ever sharded, so that a part is one range of the stored axis.
    stored = spec.hf_shape[::-1] if spec.transposed else spec.hf_shape
    ranges, axis = [], 0
    for size in stored:
        group = axis
        while math.prod(shape[axis:group]) < size:
            group += 1
        inner = math.prod(shape[axis + 1 : group])
        ranges.append(slice(bounds[axis][0] * inner, bounds[axis][1] * inner))
        axis = group
    part = source[tuple(ranges[::-1] if spec.transposed else ranges)]
    part = part.T if spec.transposed else part
    return part.reshape([stop - start for start, stop in bounds])


def save_checkpoint(
    directory: Path,
    params: dict[str, Any],
    architecture: Architecture,
    tokenizer: Tokenizer,
    *,
    dtype: jnp.dtype | None = None,
    card: str | None = None,
) -> None:
    """Writes a Hugging Face directory, whole or not at all; it must not exist.

    dtype: number format to store (None: the parameters' own). card: text of README.md.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists; name a directory that does not")
    staging = directory.with_name(directory.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    stored = jnp.dtype(dtype or params["embed"].dtype)
    _write_tensors(staging, params, architecture, _DTYPES[stored.name])
    config = config_json(architecture, stored.name)
    _write_json(staging / "config.json", config)
    ends = list(dict.fromkeys([*architecture.eos_token_ids, *tokenizer.eos_ids]))
    _write_json(staging / "generation_config.json", {"bos_token_id": architecture.bos_token_id, "eos_token_id": ends})
    tokenizer.save(staging)
    if card is not None:
        (staging / "README.md").write_text(card)
    staging.rename(directory)


def _write_tensors(directory: Path, params: dict[str, Any], architecture: Architecture, dtype: type) -> None:
    """One file, or several with an index when the tensors are more than one file should hold."""
    total = sum(math.prod(spec.shape) for _, spec in leaves(parameter_table(architecture))) * np.dtype(dtype).itemsize
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    group: dict[str, np.ndarray] = {}

    def flush() -> None:
        files.append(directory / f"part-{len(files)}.safetensors")
        weight_map.update(dict.fromkeys(group, files[-1].name))
        save_file(group, files[-1], metadata={"format": "pt"})
        files[-1].chmod(0o644)  # the library makes it readable by its owner alone, unlike every file beside it
        group.clear()

    for name, tensor in _tensors(params, architecture, dtype):
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        group[name] = tensor
    flush()
    if len(files) == 1:
        files[0].rename(directory / _SINGLE)
        return
    names = {f.name: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1)}
    for file in files:
        file.rename(directory / names[file.name])
    weight_map = {tensor: names[file] for tensor, file in weight_map.items()}
    _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(params: dict[str, Any], architecture: Architecture, dtype: type) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as Hugging Face stores them, one layer of one leaf at a time."""

    def stored(value: jax.Array, spec: ParameterSpec) -> np.ndarray:
        shape = spec.hf_shape[::-1] if spec.transposed else spec.hf_shape
        matrix = np.asarray(value).reshape(shape)
        return np.ascontiguousarray((matrix.T if spec.transposed else matrix).astype(dtype))

    for path, spec in leaves(parameter_table(architecture)):
        leaf = params
        for key in path:
            leaf = leaf[key]
        if not spec.stacked:
            yield spec.hf_name, stored(leaf, spec)
            continue
        for layer in range(spec.shape[0]):
            yield spec.hf_name.format(layer=layer), stored(leaf[layer], spec)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
