"""Attention for CPUs: loops over blocks of keys that stay in the cores' own caches. Forward pass only.

B rows, T query tokens, S key positions, N query heads, K key-value heads, G = N / K, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from isheep_jax.model.attention_reference import AttentionConfig, Partial

# Keys of a block, and queries of a block of packed rows. On a CPU a block and its logits stay in the cores' own caches:
# 512 packed tokens then take a quarter of the time. Where segments start at multiples of PACKED_BLOCK, the sums over a
# segment's keys are the same at every offset of the segment in its row.
PACKED_BLOCK = 32
# Upper bound for the keys of a block of a prefix that all rows share.
_SHARED_BLOCK = 512


def blockwise_packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    segment_ids: jax.Array | None,
) -> Partial:
    """Returns attention under `packed_mask`: for each block of queries, the key blocks of its segments are read.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H].
        v: [B, T, K, H].
        config: of the model.
        window: of the layer.
        segment_ids: [B, T]; None: each row is one segment.
    """
    B, T = q.shape[:2]
    blocks = -(-T // PACKED_BLOCK)
    padded = blocks * PACKED_BLOCK
    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, padded - T)), mode="edge")
    is_first = jnp.concatenate([jnp.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    starts = jax.lax.cummax(jnp.where(is_first, jnp.arange(padded), 0), axis=1)  # [B, T]

    attend = functools.partial(_attend_query_block, q, k, v, config, window, segments, starts)
    if blocks == 1:
        out = attend(0)
    else:
        out = jax.lax.map(attend, jnp.arange(blocks))  # [blocks, B, K, G, block, ...]
        out = Partial(*(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], padded, *x.shape[5:]) for x in out))
    return Partial(*(x[:, :, :, :T] for x in out))


def _attend_query_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    segments: jax.Array,
    starts: jax.Array,
    i: jax.Array | int,
) -> Partial:
    """Returns attention of query block i to the key blocks from the start of its first segment up to its own.

    Args:
        q: [B, T, N, H], T in whole blocks.
        k: [B, T, K, H].
        v: [B, T, K, H].
        config: of the model.
        window: of the layer.
        segments: [B, T], segment ids.
        starts: [B, T], where in the row each token's segment starts.
        i: scalar, the block's number.
    """
    within = jnp.arange(PACKED_BLOCK)[:, None] - jnp.arange(PACKED_BLOCK)
    queries, query_segments = _block(q, i), _block(segments, i)[:, :, None]

    def add_key_block(j, partial):
        distance = (i - j) * PACKED_BLOCK + within
        mask = (distance >= 0) & (True if window is None else distance < window)
        mask = mask & (query_segments == _block(segments, j)[:, None, :])
        return partial.update(queries, _block(k, j), _block(v, j), mask, config)

    first = jnp.min(_block(starts, i)) // PACKED_BLOCK
    return jax.lax.fori_loop(first, i + 1, add_key_block, Partial.init(queries, k.shape[2]))


def _block(x: jax.Array, i: jax.Array | int) -> jax.Array:
    """Returns block i [B, PACKED_BLOCK, ...] of an array [B, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, i * PACKED_BLOCK, PACKED_BLOCK, axis=1)


def blockwise_prefix_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, config: AttentionConfig
) -> Partial:
    """Returns attention to all keys of a prefix, computed block by block.

    Keys of a single row may come padded to any length, which must not change their sums, so their blocks are short.
    Keys that all rows share are the same in every call, so their blocks are long, and one product takes the queries of
    all rows.

    Args:
        q: [B, T, N, H].
        k: [B or 1, S, K, H]; 1: all rows share them.
        v: [B or 1, S, K, H].
        mask: [B or 1, T or 1, S].
        config: of the model.
    """
    B, T = q.shape[:2]
    shared, size = k.shape[0] == 1, PACKED_BLOCK
    if shared:
        size = min(_SHARED_BLOCK, -(-k.shape[1] // PACKED_BLOCK) * PACKED_BLOCK)
        q = q.reshape(1, B * T, *q.shape[2:])
        if mask.shape[:2] != (1, 1):
            mask = jnp.broadcast_to(mask, (B, T, mask.shape[2])).reshape(1, B * T, -1)
    missing = -k.shape[1] % size
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, missing)))
    k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k, v))
    k, v = (x.reshape(len(x), -1, size, *x.shape[2:]) for x in (k, v))  # [B, blocks, size, K, H]
    keys = jnp.transpose(k, (1, 0, 3, 4, 2))  # [blocks, B, K, H, size]
    values = jnp.transpose(v, (1, 0, 3, 2, 4))  # [blocks, B, K, size, H]

    def add_block(i, partial):
        block_mask = jax.lax.dynamic_slice_in_dim(mask, i * size, size, axis=2)
        return partial.update(q, keys[i], values[i], block_mask, config, layout="tiles")

    out = jax.lax.fori_loop(0, len(keys), add_block, Partial.init(q, keys.shape[2]))
    if shared:  # [1, K, G, B * T, ...] -> [B, K, G, T, ...]
        out = Partial(*(jnp.moveaxis(x.reshape(*x.shape[1:3], B, T, *x.shape[4:]), 2, 0) for x in out))
    return out
