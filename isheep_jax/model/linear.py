"""Linear layers by the kind of their weight: an array, an int8 matrix (`Quantized`), or one with a LoRA adapter.

R is the rank of an adapter; the other letters are those of `transformer`.
"""

import re

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from isheep_jax.model import quantization
from isheep_jax.model.quantization import Quantized

# Name of the results of linear layers, by which a policy of `jax.checkpoint` keeps them.
LINEAR_RESULT = "linear_result"


@flax.struct.dataclass
class LoraWeight:
    """A weight with a low-rank addition (Hu et al. 2021): x -> x W + scale * dropout(x) a b."""

    base: jax.Array | Quantized  # W, [*inputs, *outputs]
    a: jax.Array  # [*inputs, R]
    b: jax.Array  # [R, *outputs]
    dropout_key: jax.Array | None  # [2] uint32, differs between layers and leaves; None: nothing is dropped
    scale: float = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False)  # share of x that is dropped, [0, 1)


def linear(
    equation: str, x: jax.Array, weight: jax.Array | Quantized | LoraWeight, compute_dtype: jnp.dtype
) -> jax.Array:
    """Returns einsum(equation, x, weight) in compute_dtype, such as "btd,dnh->btnh"."""
    return checkpoint_name(_product(equation, x, weight, compute_dtype), LINEAR_RESULT)


def _product(
    equation: str, x: jax.Array, weight: jax.Array | Quantized | LoraWeight, compute_dtype: jnp.dtype
) -> jax.Array:
    if not isinstance(weight, LoraWeight):
        return quantization.einsum(equation, x, weight, compute_dtype)
    y = quantization.einsum(equation, x, weight.base, compute_dtype)
    down, up = _lora_equations(equation)
    if weight.dropout_key is not None and weight.dropout > 0:
        keep = dropout_mask(weight.dropout_key, x.shape, weight.dropout)
        x = jnp.where(keep, x / (1 - weight.dropout), 0).astype(x.dtype)
    x = checkpoint_name(jnp.einsum(down, x, weight.a.astype(compute_dtype)), LINEAR_RESULT)  # [B, T, R]
    return y + weight.scale * jnp.einsum(up, x, weight.b.astype(compute_dtype))


def _lora_equations(equation: str) -> tuple[str, str]:
    """Returns the equations of an adapter: "btd,dnh->btnh" is split into "btd,dr->btr" and "btr,rnh->btnh"."""
    x, weight, y = re.split(",|->", equation)
    inputs = "".join(letter for letter in weight if letter in x)
    outputs = "".join(letter for letter in weight if letter not in x)
    return f"{x},{inputs}r->btr", f"btr,r{outputs}->{y}"


def dropout_keys(key: jax.Array, layers: int, leaf: int, leaves: int) -> jax.Array:
    """Returns a leaf's key for each layer, [layers, 2] uint32.

    Args:
        key: [2] uint32.
        layers: number of layers.
        leaf: the leaf's number, from 0.
        leaves: number of leaves.
    """
    numbers = jnp.arange(layers, dtype=jnp.uint32) * leaves + leaf
    return _mix(key.astype(jnp.uint32) + numbers[:, None] * jnp.uint32(0x9E3779B1))


def dropout_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Returns which elements dropout keeps, [*shape] bool: the same on every mesh.

    Each element's number is hashed twice with MurmurHash3's finalizer (Appleby). JAX's own generator is expanded at
    every use, and a training step with its 7 masks took 8 times as long to compile.

    Args:
        key: [2] uint32, from `dropout_keys`.
        shape: of the mask.
        rate: share that is dropped, [0, 1).
    """
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = key
    return _mix(_mix(number ^ first) + second) >= jnp.uint32(round(rate * 2**32))


def _mix(x: jax.Array) -> jax.Array:
    """Returns MurmurHash3's finalizer of each element, uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
