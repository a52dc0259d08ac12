"""int8 quantization with scales, of weights while decoding and of the keys and values of a cache.

Symmetric, rounded to the nearest: x is about scale * values with scale = max |x| / 127, where the maximum is over the
axes that a product sums over. A product multiplies with the integers and scales its result. XLA converts the integers
as it reads them, so the whole matrix never exists as floats.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import Sharding

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, ParameterSpec, parameter_table

Tree = Any

# How weights, or keys and values, are stored while decoding: in the dtype of the activations, or as int8 with scales.
StorageDtype = Literal["model", "int8"]

# int8 is used symmetrically: -127..127.
_LARGEST = 127


@flax.struct.dataclass
class Quantized:
    """An array as integers: about scale * values."""

    values: jax.Array  # int8
    scale: jax.Array  # float32, without the axes of `values` along which a scale is shared


def check_storage_dtype(setting: str, dtype: str) -> None:
    """Raises `UserError` unless `dtype` is a `StorageDtype`."""
    if dtype not in get_args(StorageDtype):
        raise UserError(f"{setting}={dtype} is not known; it must be {' or '.join(get_args(StorageDtype))}")


@functools.partial(jax.jit, static_argnames="axes")
def quantize(x: jax.Array, axes: tuple[int, ...]) -> Quantized:
    """Returns an array as int8, each element off by at most half a scale. axes: those along which a scale is shared."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / _LARGEST
    values = jnp.clip(jnp.round(x / jnp.where(scale > 0, scale, 1)), -_LARGEST, _LARGEST)
    return Quantized(values.astype(jnp.int8), scale.squeeze(axes))


def dequantize(x: Quantized, axes: tuple[int, ...]) -> jax.Array:
    """Returns an array as float32. axes: as in `quantize`."""
    return x.values * jnp.expand_dims(x.scale, axes)


def einsum(
    equation: str,
    x: jax.Array,
    matrix: jax.Array | Quantized,
    dtype: jnp.dtype,
    result_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Returns jnp.einsum(equation, x, matrix).

    Args:
        equation: the last axes of its result must be those of a quantized matrix's scale.
        x: the inputs, in `dtype`.
        matrix: converted to `dtype` for the product.
        dtype: of the product's inputs.
        result_dtype: of the sums and the result; None: `dtype`.
    """
    integers = isinstance(matrix, Quantized)
    weights = (matrix.values if integers else matrix).astype(dtype)
    y = jnp.einsum(equation, x, weights, preferred_element_type=result_dtype)
    return (y * matrix.scale).astype(y.dtype) if integers else y


def embedding_lookup(table: jax.Array | Quantized, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns rows [..., D] of a table [V, D] in `dtype`. tokens: [...]."""
    if not isinstance(table, Quantized):
        return table[tokens].astype(dtype)
    return (table.values[tokens] * table.scale[tokens][..., None]).astype(dtype)


def weight_table(architecture: Architecture, weights_dtype: StorageDtype) -> Tree:
    """Returns `parameter_table`, for int8 with a `Quantized` of two `ParameterSpec` in place of each matrix.

    The embeddings have a scale for each token, all other matrices one for each output of a layer.
    """

    def stored(spec: ParameterSpec) -> ParameterSpec | Quantized:
        if weights_dtype == "model" or not spec.is_matrix:
            return spec
        kept = [i for i in range(len(spec.shape)) if i not in spec.input_axes]
        pick = {name: tuple(getattr(spec, name)[i] for i in kept) for name in ("shape", "axes")}
        return Quantized(spec, dataclasses.replace(spec, **pick))

    return jax.tree.map(stored, parameter_table(architecture))


def abstract_weights(architecture: Architecture, weights_dtype: StorageDtype, dtype: jnp.dtype) -> Tree:
    """Returns a `jax.ShapeDtypeStruct` for each array of `weight_table`. dtype: of what is not quantized."""

    def shape(spec: ParameterSpec | Quantized) -> Any:
        if isinstance(spec, Quantized):
            return Quantized(
                jax.ShapeDtypeStruct(spec.values.shape, jnp.int8), jax.ShapeDtypeStruct(spec.scale.shape, jnp.float32)
            )
        return jax.ShapeDtypeStruct(spec.shape, dtype)

    return jax.tree.map(shape, weight_table(architecture, weights_dtype), is_leaf=lambda x: isinstance(x, Quantized))


def dequantize_weights(params: Tree, architecture: Architecture) -> Tree:
    """Returns the parameters with quantized matrices as float32."""

    def plain(spec: ParameterSpec, leaf: jax.Array | Quantized) -> jax.Array:
        return dequantize(leaf, spec.input_axes) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(plain, parameter_table(architecture), params)


def put_weight(
    spec: ParameterSpec, leaf: jax.Array | Quantized, target: Sharding | Format | Quantized, dtype: jnp.dtype
) -> jax.Array | Quantized:
    """Returns a leaf on its devices, in `dtype` or as int8.

    Args:
        spec: of the leaf.
        leaf: floats, or already quantized.
        target: sharding or format of the result; a `Quantized` of two of them asks for int8.
        dtype: of the result if it is floats.
    """
    if not isinstance(target, Quantized):
        return jax.device_put(jnp.asarray(leaf, dtype), target)
    if not isinstance(leaf, Quantized):
        # Moved as floats in the sharding of the integers, so that each device quantizes its own part.
        sharding = target.values.sharding if isinstance(target.values, Format) else target.values
        leaf = quantize(jax.device_put(leaf, sharding), spec.input_axes)
    return jax.device_put(leaf, target)
