"""Arrays as 8-bit integers with scales: weights while decoding, and keys and values of a cache.

Symmetric and to the nearest: x is about scale * values with scale = max |x| / 127, of all elements that a product sums
over. So a product takes the integers as they are and its result is scaled, and XLA converts them on their way out of
memory: no matrix of floats is ever there as a whole.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Sharding

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table

Tree = Any

# How weights and keys and values are stored while decoding: in the number format of the activations, or as integers.
Storage = Literal["model", "int8"]
STORAGES = ("model", "int8")

# Of the largest element.
_LARGEST = 127


@flax.struct.dataclass
class Quantized:
    """values: int8. scale: float32, with those axes of the values that have scales of their own."""

    values: jax.Array
    scale: jax.Array


def check_storage(setting: str, storage: str) -> None:
    """Raises `UserError` unless `storage` is one of `STORAGES`."""
    if storage not in STORAGES:
        raise UserError(f"{setting}={storage} is not known; it must be {' or '.join(STORAGES)}")


@functools.partial(jax.jit, static_argnames="axes")
def quantize(x: jax.Array, axes: tuple[int, ...]) -> Quantized:
    """axes: along which a scale is shared. An element is off by half a scale at most."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _LARGEST
    values = jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), -_LARGEST, _LARGEST)
    return Quantized(values.astype(jnp.int8), scale.squeeze(axes))


def dequantize(x: Quantized, axes: tuple[int, ...]) -> jax.Array:
    """Float32 numbers; axes as in `quantize`."""
    return x.values * jnp.expand_dims(x.scale, axes)


def product(letters: str, x: jax.Array, matrix: jax.Array | Quantized, dtype: jnp.dtype, **settings) -> jax.Array:
    """einsum(letters, x, matrix) in `dtype`. The last axes of the result are those of the matrix's scale."""
    if not isinstance(matrix, Quantized):
        return jnp.einsum(letters, x, matrix.astype(dtype), **settings)
    y = jnp.einsum(letters, x, matrix.values.astype(dtype), **settings)
    return (y * matrix.scale).astype(y.dtype)


def look_up(table: jax.Array | Quantized, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [..., D] of a table [V, D]. rows: [...]."""
    if not isinstance(table, Quantized):
        return table[rows].astype(dtype)
    return (table.values[rows] * table.scale[rows][..., None]).astype(dtype)


def weight_table(architecture: Architecture, weights: Storage) -> Tree:
    """`parameter_table`; with int8 weights a `Quantized` of two `ParameterSpec` in the place of each matrix.

    The embeddings have a scale for each token, all other matrices one for each output of a layer.
    """

    def stored(spec: ParameterSpec) -> ParameterSpec | Quantized:
        if weights == "model" or not spec.is_matrix:
            return spec
        kept = [i for i in range(len(spec.shape)) if i not in spec.input_axes]
        pick = {name: tuple(getattr(spec, name)[i] for i in kept) for name in ("shape", "axes")}
        return Quantized(spec, dataclasses.replace(spec, **pick))

    return jax.tree.map(stored, parameter_table(architecture))


def abstract_weights(architecture: Architecture, weights: Storage, dtype: jnp.dtype) -> Tree:
    """A `jax.ShapeDtypeStruct` for each array of the weights; dtype: of what is not quantized."""

    def shape(spec: ParameterSpec | Quantized) -> Any:
        if isinstance(spec, Quantized):
            return Quantized(
                jax.ShapeDtypeStruct(spec.values.shape, jnp.int8), jax.ShapeDtypeStruct(spec.scale.shape, jnp.float32)
            )
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    return jax.tree.map(shape, weight_table(architecture, weights), is_leaf=lambda x: isinstance(x, Quantized))


def dequantize_weights(params: Tree, architecture: Architecture) -> Tree:
    """The weights as float32, where they are quantized."""

    def plain(spec: ParameterSpec, leaf: jax.Array | Quantized) -> jax.Array:
        return dequantize(leaf, spec.input_axes) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(plain, parameter_table(architecture), params)


def place_leaf(
    spec: ParameterSpec, leaf: jax.Array | Quantized, place: Sharding | Format | Quantized, dtype: jnp.dtype
) -> jax.Array | Quantized:
    """A leaf at its place; quantized where the place is a `Quantized` of two, else as `dtype`."""
    if not isinstance(place, Quantized):
        return jax.device_put(jnp.asarray(leaf, dtype), place)
    if not isinstance(leaf, Quantized):
        # As floats where the integers are going to lie, so that each device rounds its own part.
        split = place.values.sharding if isinstance(place.values, Format) else place.values
        leaf = quantize(jax.device_put(leaf, split), spec.input_axes)
    return jax.device_put(leaf, place)
