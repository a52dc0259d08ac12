"""LoRA adapters (Hu et al., 2021) in training: made, and applied to the weights that they belong to."""

from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table
from isheep_jax.model.linear import LoraWeight, dropout_keys
from isheep_jax.model.lora import lora_table

Tree = Any


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
