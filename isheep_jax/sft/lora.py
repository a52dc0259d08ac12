"""LoRA (Hu et al., 2021): each linear weight W of the layers learns a low-rank addition, W + alpha / rank * A B."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table

Tree = Any


def lora_table(architecture: Architecture, rank: int) -> dict[str, Any]:
    """A `ParameterSpec` for each leaf of the adapters' tree: {"layers": {"wq": {"a": ..., "b": ...}, ...}}.

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
    """Adapters that change nothing yet, float32: a uniform within 1 / sqrt(inputs), PEFT's choice, and b zero."""
    specs, tree = jax.tree.flatten(lora_table(architecture, rank))

    def draw(spec: ParameterSpec, key: jax.Array) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, jnp.float32)
        bound = spec.hf_shape[1] ** -0.5
        return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)

    return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(specs, jax.random.split(key, len(specs)))])


def merge_lora(params: Tree, lora: Tree, scale: float) -> Tree:
    """The parameters with the adapters' products added in float32, each in its weight's own number format."""

    def add(weight: jax.Array, adapter: dict[str, jax.Array]) -> jax.Array:
        a, b = adapter["a"], adapter["b"]
        L, rank = a.shape[0], a.shape[-1]
        product = jnp.einsum("lir,lro->lio", a.reshape(L, -1, rank), b.reshape(L, rank, -1))
        return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)

    layers = params["layers"]
    return {**params, "layers": {**layers, **{n: add(layers[n], adapter) for n, adapter in lora["layers"].items()}}}
