"""LoRA adapters (Hu et al., 2021) as parameters, and how they are added to the weights that they belong to.

Each linear weight W of the layers gets a low-rank addition, W + alpha / rank * a b.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table

Tree = Any

# Ranks that are added in one step of a loop: all of a usual adapter.
_UNROLLED = 16


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


def merge_leaf(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns a weight with its adapter's product added in float32, rounded to the weight's own dtype.

    The ranks are added one after the other, element by element: so every bit is the same however the weight is split
    over devices, which a matrix product does not promise. One layer at a time is in float32.

    Args:
        weight: [L, *inputs, *outputs].
        a: [L, *inputs, rank].
        b: [L, rank, *outputs].
        scale: factor of the product, alpha / rank.
    """
    inputs, outputs, rank = a.ndim - 2, b.ndim - 2, a.shape[-1]

    def add(layer: jax.Array, merged: jax.Array) -> jax.Array:
        w, a_layer, b_layer = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (merged, a, b))

        def add_rank(r: jax.Array, product: jax.Array) -> jax.Array:
            column = jax.lax.dynamic_index_in_dim(a_layer, r, axis=inputs, keepdims=False)
            row = jax.lax.dynamic_index_in_dim(b_layer, r, axis=0, keepdims=False)
            return product + column.reshape(*column.shape, *[1] * outputs) * row

        zeros = jnp.zeros(w.shape, jnp.float32)
        product = jax.lax.fori_loop(0, rank, add_rank, zeros, unroll=min(rank, _UNROLLED))
        return merged.at[layer].set((w.astype(jnp.float32) + scale * product).astype(w.dtype))

    return jax.lax.fori_loop(0, weight.shape[0], add, weight)


def merge_lora(params: Tree, lora: Tree, scale: float) -> Tree:
    """Returns the parameters with the adapters merged, see `merge_leaf`."""
    layers = params["layers"]
    merged = {name: merge_leaf(layers[name], x["a"], x["b"], scale) for name, x in lora["layers"].items()}
    return {**params, "layers": {**layers, **merged}}
