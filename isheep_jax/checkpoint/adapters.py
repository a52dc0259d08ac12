"""LoRA adapters in directories that PEFT loads: written, read, and merged into the weights that they belong to."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from isheep_jax import distributed
from isheep_jax.checkpoint.adapter_config import ADAPTER_CONFIG, base_of
from isheep_jax.checkpoint.hf_save import write_small_files, write_tensors
from isheep_jax.checkpoint.hf_weights import load_leaf, read_whole, tensors_of
from isheep_jax.checkpoint.safetensors_file import DTYPES, StoredTensor, read_header_and_metadata
from isheep_jax.config import SFTConfig
from isheep_jax.errors import UserError, quoted
from isheep_jax.files import reader_threads, whole_directory
from isheep_jax.model.architecture import Architecture, ParameterSpec
from isheep_jax.model.lora import lora_table, merge_leaf
from isheep_jax.sharding import ShardingRules
from isheep_jax.text.json_files import read_json_object
from isheep_jax.text.tokenizer import Tokenizer

_STEM = "adapter_model"
_HUB_REVISION = re.compile(r"([^/@:]+/[^/@:]+)@([^@]+)")
# Entry of the file's metadata: the dtype that merged weights are rounded to, as those that were trained on were.
_MERGED_DTYPE = "merged_dtype"
# What PEFT can do beyond low-rank additions to linear weights, with the values that switch it off.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
}


@dataclass(frozen=True)
class _Part:
    """One of the two matrices of an adapted leaf: its parameter, and its tensors by layer."""

    spec: ParameterSpec
    tensors: Sequence[StoredTensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter in a directory.

    base: the model that it belongs to: a path, or a hub id such as "org/name@revision".
    scale: factor of its products. merged_dtype: of the weights that it was trained on; merged ones are rounded to it.
    leaves: a and b of each adapted leaf of the layers.
    """

    directory: epath.Path
    base: str
    scale: float
    merged_dtype: np.dtype
    leaves: Mapping[str, tuple[_Part, _Part]] = field(repr=False)


def save_adapter(
    directory: epath.PathLike,
    lora: Any,
    architecture: Architecture,
    config: SFTConfig,
    base: str,
    *,
    dtype: jnp.dtype,
    tokenizer: Tokenizer,
    card: str | None = None,
) -> dict[str, str]:
    """Writes the adapters as a directory that PEFT loads, on a disk whole or not at all; an existing one is replaced.

    Beside them lies everything of a model but the base's weights: config, tokenizer, chat template.

    The tensors stay float32, as PEFT trains and stores them: they are small, and rounding them to the dtype of the
    weights would lose what training in float32 gained.

    Args:
        directory: to write.
        lora: the adapters.
        architecture: the model's.
        config: rank, alpha and dropout.
        base: the model that the adapters belong to, as `transformers` would load it; "org/name@revision" names a
            revision on the hub.
        dtype: dtype of the weights that they are merged into.
        tokenizer: the model's, with the chat template that they were trained with.
        card: text of README.md; None: no file.

    Returns the sha256 of the file of the adapters by its name, in the primary.
    """
    table = lora_table(architecture, config.lora_rank)
    hub = _HUB_REVISION.fullmatch(base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub[1] if hub else base,
        "revision": hub[2] if hub else None,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(_module(spec["a"]) for spec in table["layers"].values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    metadata = {_MERGED_DTYPE: jnp.dtype(dtype).name}
    with whole_directory(directory) as partial:
        # PEFT reads no index.
        digests = write_tensors(partial, lora, table, jnp.float32, stem=_STEM, single_file=True, metadata=metadata)
        if distributed.is_primary():
            write_small_files(partial, architecture, tokenizer, dtype, card)
            (partial / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return digests


def read_adapter(directory: epath.Path, architecture: Architecture) -> Adapter:
    """Reads an adapter, except for the numbers.

    Raises `UserError`, naming the file, when it is not one of LoRA on linear weights of the architecture's layers.
    """
    path = directory / ADAPTER_CONFIG
    settings = read_json_object(path)
    for name, plain in _PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise UserError(f"{path}: adapters with {name}={quoted(settings[name])} are not read")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{path}: r and lora_alpha should be numbers, r a whole one above 0")
    weights = directory / f"{_STEM}.safetensors"
    tensors, metadata = read_header_and_metadata(weights)
    leaves = {}
    for name, specs in lora_table(architecture, rank)["layers"].items():
        if specs["a"].hf_name.format(layer=0) in tensors:
            leaves[name] = tuple(
                _Part(spec, [tensors.pop(tensor.name) for tensor in tensors_of(weights, tensors, spec)])
                for spec in (specs["a"], specs["b"])
            )
    if tensors or not leaves:
        which = f"tensor {quoted(min(tensors))} belongs to no linear weight of" if tensors else "there is nothing for"
        raise UserError(f"{weights}: {which} the base {quoted(base_of(directory, settings))}")
    dtypes = {dtype.name: dtype for dtype in DTYPES.values()}
    if (name := metadata.get(_MERGED_DTYPE)) not in dtypes:
        raise UserError(f"{weights} does not say in which dtype it is merged; it is none that a run made")
    return Adapter(directory, base_of(directory, settings), alpha / rank, dtypes[name], leaves)


def _module(spec: ParameterSpec) -> str:
    """Returns the name of the module that an adapter's tensor belongs to, such as q_proj."""
    return spec.hf_name.split(".")[-3]


def merged_into(leaf: jax.Array, name: str, adapter: Adapter, *, mesh: Mesh, rules: ShardingRules) -> jax.Array:
    """Returns a leaf of the layers, whose memory is given up, with what an adapter adds to it."""
    if name not in adapter.leaves:
        return leaf
    with ThreadPoolExecutor(reader_threads(adapter.directory)) as threads:
        a, b = (
            load_leaf(part.tensors, part.spec, mesh=mesh, rules=rules, dtype=jnp.float32, threads=threads)
            for part in adapter.leaves[name]
        )
    return merge_program(leaf.sharding, adapter.scale)(leaf, a, b)


@functools.lru_cache(maxsize=64)
def merge_program(sharding: NamedSharding, scale: float) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns `merge_leaf` for leaves of a sharding, in the memory of the leaf."""
    return jax.jit(functools.partial(merge_leaf, scale=scale), donate_argnums=0, out_shardings=sharding)


def merged_tensor(tensor: jax.Array, name: str, layer: int, adapter: Adapter) -> jax.Array:
    """Returns the stored tensor of a leaf's layer with what an adapter adds to it, on a device of this process.

    The numbers are those of `merged_into`.
    """
    if name not in adapter.leaves:
        return tensor
    a, b = (read_whole(part.tensors[layer]) for part in adapter.leaves[name])
    return _merge_stored(tensor, a, b, scale=adapter.scale)


@functools.partial(jax.jit, static_argnames="scale")
def _merge_stored(tensor: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns a stored weight [outputs, inputs] with its adapter, a [rank, inputs] and b [outputs, rank], merged."""
    a, b = (x.T[None].astype(jnp.float32) for x in (a, b))
    return merge_leaf(tensor.T[None], a, b, scale)[0].T
