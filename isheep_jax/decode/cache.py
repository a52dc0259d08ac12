"""Slots of the KV cache: how many, how long, where they live, and the few shapes in which prompts are prefilled."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache, cache_spec, init_cache
from isheep_jax.sharding import DECODE_RULES, ActivationSharding, batch_sharding

# Below this, a further bucket would save less time in prefill than its compilation costs.
_SHORTEST_BUCKET = 32
# Rows of one prefill call on each data shard, and the tokens at which long prompts take fewer rows. Few rows waste
# little when few slots are free; about a thousand tokens already keep the matrix units of an accelerator busy.
_PREFILL_ROWS = 8
_PREFILL_TOKENS = 8192


def length_buckets(context: int) -> tuple[int, ...]:
    """Padded prompt lengths: powers of two below the context, and the context itself."""
    buckets = []
    length = _SHORTEST_BUCKET
    while length < context:
        buckets.append(length)
        length *= 2
    return (*buckets, context)


def bucket_of(length: int, context: int) -> int:
    """The smallest bucket that holds `length` tokens; it depends on no other request."""
    return next(bucket for bucket in length_buckets(context) if bucket >= length)


def data_shards(mesh: Mesh | None) -> int:
    """Groups of devices that hold different rows of a batch while decoding."""
    return 1 if mesh is None else mesh.shape[DECODE_RULES["batch"]]


def prefill_rows(bucket: int, mesh: Mesh | None) -> int:
    """Prompts in one prefill call of a bucket (count, over all devices)."""
    return max(1, min(_PREFILL_ROWS, _PREFILL_TOKENS // bucket)) * data_shards(mesh)


def check_rows(setting: str, rows: int, mesh: Mesh | None) -> None:
    """Raises `UserError` unless `rows` is a positive multiple of the mesh's data axis."""
    shards = data_shards(mesh)
    if rows < 1 or rows % shards:
        nearest = max(shards, round(rows / shards) * shards)
        raise UserError(f"{setting}={rows} does not divide over {shards} data shards; the nearest that does: {nearest}")


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Rows and heads of a cache split by the decode rules."""
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_sharding(mesh))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Of keys and of values while decoding."""
    return NamedSharding(mesh, cache_spec(DECODE_RULES))


def decode_activations(mesh: Mesh | None) -> ActivationSharding:
    """Where activations lie while decoding."""
    return ActivationSharding(mesh, DECODE_RULES)


def constrain_rows(rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The first axis of an array split by the decode rules."""
    return rows if mesh is None else jax.lax.with_sharding_constraint(rows, batch_sharding(mesh, DECODE_RULES))


def replicate(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A copy on every device, so that every host can read the whole."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames=("architecture", "slots", "context", "dtype", "mesh"))
def allocate(architecture: Architecture, slots: int, context: int, dtype: jnp.dtype, mesh: Mesh | None) -> KVCache:
    """An empty cache of `slots` rows of `context` positions, each device making only its own part."""
    return constrain_cache(init_cache(architecture, slots, context, dtype), mesh)


def cache_bytes(architecture: Architecture, slots: int, context: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values over all devices."""
    heads = architecture.kv_heads * architecture.head_dim
    return 2 * architecture.layers * slots * context * heads * jnp.dtype(dtype).itemsize


def write_rows(cache: KVCache, rows: KVCache, slots: jax.Array, mesh: Mesh | None) -> KVCache:
    """Copies prefilled rows of T positions into positions 0..T-1 of the given slots [R]; slot -1: nowhere.

    The rows that a data shard holds go to slots that it holds, so that no keys or values travel.
    """
    per_shard = cache.k.shape[1] // data_shards(mesh)
    # Negative indices would wrap; one past the end is dropped by the scatter.
    local = jnp.where(slots < 0, per_shard, slots % per_shard)

    def write(cache, rows, local):
        return cache.at[:, local, : rows.shape[2]].set(rows, mode="drop")

    if mesh is not None:
        split = cache_spec(DECODE_RULES)
        write = jax.shard_map(write, mesh=mesh, in_specs=(split, split, P(DECODE_RULES["batch"])), out_specs=split)
    return KVCache(write(cache.k, rows.k, local), write(cache.v, rows.v, local))
