"""Slots of the KV cache: how many, how long, where they live, and the few shapes in which prompts are prefilled."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.transformer import KVCache, init_cache
from isheep_jax.sharding import DECODE_RULES, batch_sharding

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
    """Rows and heads of a cache [L, B, S, K, H] split by the decode rules."""
    if mesh is None:
        return cache
    split = P(None, DECODE_RULES["batch"], None, DECODE_RULES["kv_heads"], None)
    return jax.lax.with_sharding_constraint(cache, NamedSharding(mesh, split))


def constrain_rows(rows: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The first axis of an array split by the decode rules."""
    return rows if mesh is None else jax.lax.with_sharding_constraint(rows, batch_sharding(mesh, DECODE_RULES))


def replicate(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A copy on every device, so that every host can read the whole."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames=("architecture", "slots", "context", "dtype", "mesh"))
def allocate(architecture: Architecture, slots: int, context: int, dtype: jnp.dtype, mesh: Mesh | None) -> KVCache:
    """An empty cache [L, slots, context, K, H], each device making only its own part."""
    return constrain_cache(init_cache(architecture, slots, context, dtype), mesh)


def cache_bytes(architecture: Architecture, slots: int, context: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values over all devices."""
    heads = architecture.kv_heads * architecture.head_dim
    return 2 * architecture.layers * slots * context * heads * jnp.dtype(dtype).itemsize


def write_rows(cache: KVCache, rows: KVCache, slots: jax.Array) -> KVCache:
    """Copies prefilled rows [L, R, T, K, H] into positions 0..T-1 of the given slots [R].

    Two rows may name one slot only if they are equal.
    """
    length = rows.k.shape[2]
    return cache.replace(k=cache.k.at[:, slots, :length].set(rows.k), v=cache.v.at[:, slots, :length].set(rows.v))
