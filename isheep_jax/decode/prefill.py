"""Prefill: the keys and values of prompts and of the prefixes that they share."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.decode.cache import (
    cache_sharding,
    constrain_cache,
    constrain_rows,
    data_shards,
    decode_setup,
    replicate,
)
from isheep_jax.decode.packing import POSITION, SEGMENT, SLOT, TOKEN
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import CacheWrite, KVCache, PrefixKV
from isheep_jax.model.transformer import forward


@flax.struct.dataclass
class Prefix:
    """Keys and values of the tokens that all sequences of a call begin with."""

    cache: KVCache  # one row, always floats: that is little memory
    length: jax.Array  # scalar int32, tokens; later cache positions are padding


def prefix_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a prefix's keys and values: whole on every data shard, heads split over tensor shards."""
    return NamedSharding(mesh, PartitionSpec(None, None, *cache_sharding(mesh).spec[2:]))


def prefix_kv(prefix: Prefix | None) -> tuple[PrefixKV, ...]:
    """The prefix as keys and values that every token attends to."""
    if prefix is None:
        return ()
    positions = jnp.arange(prefix.cache.length, dtype=jnp.int32)
    return (PrefixKV(prefix.cache, (positions < prefix.length)[None, None], positions[None]),)


def prefix_length(prefix: Prefix | None) -> jax.Array | int:
    """Tokens of the prefix: the position of the first token after it."""
    return 0 if prefix is None else prefix.length


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def make_prefix(
    params: dict,
    tokens: jax.Array,
    length: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> Prefix:
    """Prefills a prefix. tokens: [P] int32, of which the first `length` count."""
    # Every data shard computes the same row, so that each has the result.
    tokens = constrain_rows(jnp.broadcast_to(tokens, (data_shards(mesh), *tokens.shape)), mesh)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    _, cache = forward(
        params,
        architecture,
        tokens,
        positions,
        decode_setup(mesh, compute_dtype),
        collect_kv=True,
    )
    sharding = prefix_sharding(mesh)
    cache = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[:, :1], sharding), cache)
    return Prefix(cache, replicate(length, mesh))


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"), donate_argnames=("cache",))
def prefill(
    params: dict,
    cache: KVCache,
    packed: jax.Array,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> KVCache:
    """Writes the keys and values of prompts to the cache rows of their slots. Returns the cache.

    The first decode step computes a prompt's last token again, so that the first new token is sampled like all others.

    Args:
      params: weights.
      cache: of all slots; donated.
      packed: [R, T, 4] int32, see `packing`; a token's slot is on the data shard of its row.
      prefix: tokens that all the prompts follow.
    """
    packed = constrain_rows(packed, mesh)
    _, cache = forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., POSITION] + prefix_length(prefix),
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
        prefix_kv=prefix_kv(prefix),
        cache=CacheWrite(cache, packed[..., POSITION], packed[..., SLOT]),
    )
    return constrain_cache(cache, mesh)
