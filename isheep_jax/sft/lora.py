"""LoRA adapters (Hu et al., 2021): made, applied, merged and saved for PEFT.

Each linear weight W of the layers learns a low-rank addition, W + alpha / rank * a b.
"""

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from isheep_jax import distributed
from isheep_jax.checkpoint.hf_weights import write_tensors
from isheep_jax.config import SFTConfig
from isheep_jax.files import whole_directory
from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table
from isheep_jax.model.linear import LoraWeight, dropout_keys

Tree = Any


def lora_table(architecture: Architecture, rank: int) -> dict[str, Any]:
    """Returns a `ParameterSpec` for each leaf of the adapters' tree: {"layers": {"wq": {"a": ..., "b": ...}, ...}}.

    For a weight [L, *inputs, *outputs], a is [L, *inputs, rank] and b is [L, rank, *outputs]. Names are PEFT's.
    """
    layers = parameter_table(architecture)["layers"]
    return {"layers": {name: _adapter(spec, rank) for name, spec in layers.items() if spec.transposed}}


def _adapter(spec: ParameterSpec, rank: int) -> dict[str, ParameterSpec]:
    outputs, inputs = spec.hf_shape
    split = next(i for i in range(2, len(spec.shape)) if math.prod(spec.shape[1:i]) == inputs)
    prefix = "base_model.model." + spec.hf_name.removesuffix(".weight")
    return {
        "a": ParameterSpec(
            (*spec.shape[:split], rank),
            (*spec.axes[:split], "lora_rank"),
            "normal",
            f"{prefix}.lora_A.weight",
            (rank, inputs),
            transposed=True,
        ),
        "b": ParameterSpec(
            (spec.shape[0], rank, *spec.shape[split:]),
            (spec.axes[0], "lora_rank", *spec.axes[split:]),
            "zeros",
            f"{prefix}.lora_B.weight",
            (outputs, rank),
            transposed=True,
        ),
    }


def init_lora(key: jax.Array, architecture: Architecture, rank: int) -> Tree:
    """Returns float32 adapters that change nothing yet: a is uniform within 1 / sqrt(inputs) as in PEFT, b is zero."""
    specs, tree = jax.tree.flatten(lora_table(architecture, rank))

    def draw(spec: ParameterSpec, key: jax.Array) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        bound = spec.hf_shape[1] ** -0.5
        return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)

    return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(specs, jax.random.split(key, len(specs)))])


def apply_lora(
    params: Tree,
    adapters: Tree,
    architecture: Architecture,
    *,
    scale: float,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Tree:
    """Returns the parameters with a `LoraWeight` in place of each adapted weight.

    Args:
        params: the frozen parameters.
        adapters: a tree as in `lora_table`.
        architecture: the model's.
        scale: factor of the adapters' products, alpha / rank.
        dropout: share of an adapter's input that is dropped, 0 to below 1.
        dropout_key: two uint32, another pair in each update; None: nothing is dropped.
    """
    # In the table's own order, which numbers the leaves: under jit the keys of a dict are sorted.
    leaves = [name for name, spec in parameter_table(architecture)["layers"].items() if spec.transposed]
    layers = dict(params["layers"])
    for number, name in enumerate(leaves):
        keys = None
        if dropout_key is not None and dropout > 0:
            keys = dropout_keys(dropout_key, architecture.layers, number, len(leaves))
        adapter = adapters["layers"][name]
        layers[name] = LoraWeight(layers[name], adapter["a"], adapter["b"], keys, scale, dropout)
    return {**params, "layers": layers}


def merge_lora(params: Tree, lora: Tree, scale: float) -> Tree:
    """Returns the parameters with the adapters' products added in float32, each rounded to its weight's own dtype."""

    def add(weight: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
        a, b = adapter["a"], adapter["b"]
        L, rank = a.shape[0], a.shape[-1]
        product = jnp.einsum("lir,lro->lio", a.reshape(L, -1, rank), b.reshape(L, rank, -1))
        return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)

    layers = params["layers"]
    return {**params, "layers": {**layers, **{n: add(layers[n], adapter) for n, adapter in lora["layers"].items()}}}


def save_adapter(
    directory: epath.PathLike, lora: Tree, architecture: Architecture, config: SFTConfig, base: str
) -> dict[str, str]:
    """Writes the adapters as a directory that PEFT loads, on a disk whole or not at all; an existing one is replaced.

    The tensors stay float32, as PEFT trains and stores them: they are small, and rounding them to the dtype of the
    weights would lose what training in float32 gained.

    Args:
        directory: to write.
        lora: the adapters.
        architecture: the model's.
        config: rank, alpha and dropout.
        base: the model that the adapters belong to, as `transformers` would load it; "org/name@revision" names a
            revision on the hub.

    Returns the sha256 of the file of the adapters by its name, in the primary.
    """
    table = lora_table(architecture, config.lora_rank)
    modules = sorted(spec["a"].hf_name.split(".")[-3] for spec in table["layers"].values())
    hub = re.fullmatch(r"([^/@:]+/[^/@:]+)@([^@]+)", base)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub[1] if hub else base,
        "revision": hub[2] if hub else None,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_directory(directory) as partial:
        # PEFT reads no index.
        digests = write_tensors(partial, lora, table, jnp.float32, stem="adapter_model", single_file=True)
        if distributed.is_primary():
            (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return digests
