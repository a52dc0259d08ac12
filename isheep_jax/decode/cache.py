"""Slots of the KV cache: how many, how long, where they live, and the few shapes in which prompts are prefilled."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.attention_blockwise import PACKED_BLOCK
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.model.kv_cache import KVCache, cache_spec, init_cache
from isheep_jax.model.transformer import ForwardSetup
from isheep_jax.sharding import DECODE_RULES, ActivationSharding, batch_sharding

# Caches are read in blocks, which their lengths are multiples of; a multiple of the tiles that a CPU reads.
_BLOCK = 128
# The unit of TPU kernels along a row.
_LANES = 128


def cache_length(context: int) -> int:
    """Slots of a row that holds `context` tokens."""
    return -(-context // _BLOCK) * _BLOCK


def alignment(mesh: Mesh | None) -> int:
    """Prompts begin at multiples of this in packed rows (tokens), so that neighbors change nothing of their sums."""
    return _LANES if decode_activations(mesh).platform == "tpu" else PACKED_BLOCK


def bucket_of(length: int, align: int) -> int:
    """The padded length of a row: a power of two, from 256 on also the quarters between, so few shapes are compiled.

    align: a power of two, the shortest row (tokens).
    """
    power = align
    while power < length:
        power *= 2
    if power <= 256:
        return power
    quarter = power // 8
    return -(-length // quarter) * quarter


def data_shards(mesh: Mesh | None) -> int:
    """Groups of devices that hold different rows of a batch while decoding."""
    return 1 if mesh is None else mesh.shape[DECODE_RULES.batch]


def check_rows(setting: str, rows: int, mesh: Mesh | None) -> None:
    """Raises `UserError` unless `rows` is a positive multiple of the mesh's data axis."""
    shards = data_shards(mesh)
    if rows < 1 or rows % shards:
        nearest = max(shards, round(rows / shards) * shards)
        raise UserError(f"{setting}={rows} does not divide over {shards} data shards; the nearest that does: {nearest}")


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Rows and heads of a cache split by the decode rules."""
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_sharding(mesh))


def cache_sharding(mesh: Mesh | None) -> NamedSharding | SingleDeviceSharding:
    """Of keys and of values while decoding."""
    if mesh is None:
        # An explicit device: otherwise arrays fresh from a jitted function and arrays from the host are not the same to
        # jit's cache, and every program would compile once for each.
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, cache_spec(DECODE_RULES))


def rows_sharding(mesh: Mesh | None) -> NamedSharding | SingleDeviceSharding:
    """Of an array whose first axis is that of the slots."""
    return cache_sharding(None) if mesh is None else batch_sharding(mesh, DECODE_RULES)


def constrain_rows(rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The first axis of an array split by the decode rules."""
    return rows if mesh is None else jax.lax.with_sharding_constraint(rows, batch_sharding(mesh, DECODE_RULES))


def replicate(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A copy on every device, so that every host can read the whole."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P()))


def decode_activations(mesh: Mesh | None) -> ActivationSharding:
    """Where activations lie while decoding."""
    return ActivationSharding(mesh, DECODE_RULES)


def decode_setup(mesh: Mesh | None, compute_dtype: jnp.dtype) -> ForwardSetup:
    """Returns the static choices of a forward pass while decoding."""
    return ForwardSetup(compute_dtype, decode_activations(mesh), differentiable=False)


def allocate(architecture: Architecture, slots: int, context: int, dtype: jnp.dtype, mesh: Mesh | None) -> KVCache:
    """An empty cache of `slots` rows for `context` tokens, each device making only its own part."""
    return init_cache(architecture, slots, cache_length(context), dtype, cache_sharding(mesh), _tile(mesh))


def abstract_cache(
    architecture: Architecture, slots: int, context: int, dtype: jnp.dtype, mesh: Mesh | None
) -> KVCache:
    """What `allocate` makes, without making it: shapes and dtypes."""
    return jax.eval_shape(lambda: init_cache(architecture, slots, cache_length(context), dtype, tile=_tile(mesh)))


def _tile(mesh: Mesh | None) -> int:
    platform = decode_activations(mesh).platform
    return cache_block(platform) if platform == "cpu" else 0
