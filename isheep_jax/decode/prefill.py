"""Prefill: the forward pass over packed prompts and over the prefixes that they share."""

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
from isheep_jax.model.attention_blockwise import PACKED_BLOCK
from isheep_jax.model.kv_cache import CacheWrite, KVCache, PrefixKV
from isheep_jax.model.transformer import forward


@flax.struct.dataclass
class Prefix:
    """Keys and values of the tokens that all sequences of a call begin with."""

    cache: KVCache  # one row, always floats: that is little memory
    length: jax.Array  # scalar int32, tokens; later cache positions are padding


def prefix_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a prefix's keys and values: whole on every data shard, heads split over tensor shards."""
    return NamedSharding(mesh, PartitionSpec(None, None, *cache_sharding(mesh).spec[2:]))


def prefix_kv(prefix: Prefix | None) -> tuple[PrefixKV, ...]:
    """Returns the prefix as keys and values that every token attends to."""
    if prefix is None:
        return ()
    positions = jnp.arange(prefix.cache.length, dtype=jnp.int32)
    return (PrefixKV(prefix.cache, (positions < prefix.length)[None, None], positions[None]),)


def prefix_length(prefix: Prefix | None) -> jax.Array | int:
    """Returns the tokens of the prefix: the position of the first token after it."""
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
    """Returns a prefilled prefix.

    Args:
        params: weights.
        tokens: [P] int32.
        length: scalar int32, how many of them are not padding.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
    """
    # Every data shard computes the same row, so that each has the result.
    tokens = constrain_rows(jnp.broadcast_to(tokens, (data_shards(mesh), *tokens.shape)), mesh)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    _, cache = forward(params, architecture, tokens, positions, decode_setup(mesh, compute_dtype), collect_kv=True)
    sharding = prefix_sharding(mesh)
    cache = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[:, :1], sharding), cache)
    return Prefix(cache, replicate(length, mesh))


def forward_packed(
    params: dict,
    packed: jax.Array,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
    cache: KVCache | None = None,
    collect_kv: bool = False,
) -> tuple[jax.Array, KVCache | None]:
    """Returns hidden states [R, T, D] of packed prompts in compute_dtype, and a KV cache or None (see `forward`).

    Args:
        params: weights.
        packed: [R, T, 4] int32, see `packing`; sharded as rows.
        prefix: tokens that all the prompts follow.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
        cache: of all slots, to which keys and values are written; returned.
        collect_kv: without a `cache`, returns the keys and values of the rows [L, R, T, K * H] as a cache.
    """
    write = None
    if cache is not None:
        # Prompts begin at multiples of `PACKED_BLOCK` in their rows, on every platform.
        write = CacheWrite(cache, packed[..., POSITION], packed[..., SLOT], group=PACKED_BLOCK)
    return forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., POSITION] + prefix_length(prefix),
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
        prefix_kv=prefix_kv(prefix),
        cache=write,
        collect_kv=collect_kv,
    )


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
    """Returns the cache with the keys and values of prompts written to the cache rows of their slots.

    The first decode step computes a prompt's last token again, so that the first new token is sampled like all others.

    Args:
        params: weights.
        cache: of all slots; donated.
        packed: [R, T, 4] int32, see `packing`; a token's slot is on the data shard of its row.
        prefix: tokens that all the prompts follow.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
    """
    packed = constrain_rows(packed, mesh)
    _, cache = forward_packed(
        params,
        packed,
        prefix,
        architecture=architecture,
        mesh=mesh,
        compute_dtype=compute_dtype,
        cache=cache,
    )
    return constrain_cache(cache, mesh)
