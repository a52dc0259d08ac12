"""Attention to a KV cache, on every platform: reads blocks of cache positions up to the end of the longest row.

A GPU that has no kernel for it (`attention_gpu.kernel_refusal`) reads as many blocks as the host says (`key_limit`):
with a bound that only the device knows, the host would wait for it in every layer, and nothing would be queued behind.

B rows, T query tokens, S cache positions, C cache positions of a block, N query heads, K key-value heads, H head dim.
"""

import math

import jax
import jax.numpy as jnp

from isheep_jax.model.attention_reference import AttentionConfig, Partial, cached_mask
from isheep_jax.model.kv_cache import KVCache, split_heads
from isheep_jax.sharding import ActivationSharding

# Cache positions of a block. On a CPU a block is a tile of the cache (see `KVCache`): with a flat cache, 64 rows of 160
# or of 650 keys take twice as long.
_CACHE_BLOCK_CPU = 128
_CACHE_BLOCK = 512
# A CPU sorts the cache rows by length and reads groups of so many, each up to the end of its longest row: for 64 rows
# with 160 keys on average and 380 at most this takes three fifths of the time.
_GROUP_ROWS = 8
# Name in compiled programs of the kernel in `attention_decode_tpu`; here because importing Pallas takes a while.
DECODE_KERNEL = "ragged_decode_attention"
# Up to so many blocks are read without a loop, so that a GPU can replay them as one graph.
_UNROLLED_BLOCKS = 8


def cache_block(platform: str) -> int:
    """Returns how many cache positions are read at a time if the length of the cache is a multiple of them."""
    return _CACHE_BLOCK_CPU if platform == "cpu" else _CACHE_BLOCK


def blockwise_cached_attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    cache_positions: jax.Array,
    key_limit: int,
    sharding: ActivationSharding,
) -> Partial:
    """Returns attention of each row's tokens to the row's cache positions up to their own.

    The blocks after a row's end do not change a bit of its result.

    Args:
        q: [B, T, N, H].
        cache: of all layers.
        layer: scalar, the layer's number.
        config: of the model.
        window: of the layer.
        cache_positions: [B, T], the tokens' positions in the cache; a row at -1 sees nothing.
        key_limit: see `CacheWrite`.
        sharding: says which devices compute.
    """
    rows = cache.k.shape[1]
    one_cpu = sharding.platform == "cpu" and sharding.mesh.size == 1
    block = cache.tile or math.gcd(cache.length, cache_block(sharding.platform))
    if not one_cpu or rows % _GROUP_ROWS or rows <= _GROUP_ROWS:
        return _attend_rows(q, cache, layer, config, window, cache_positions, None, key_limit, block)

    def attend_group(group: jax.Array) -> Partial:
        return _attend_rows(q[group], cache, layer, config, window, cache_positions[group], group, key_limit, block)

    order = jnp.argsort(jnp.max(cache_positions, axis=1))
    out = jax.lax.map(attend_group, order.reshape(-1, _GROUP_ROWS))
    return Partial(*(jnp.zeros((rows, *x.shape[2:])).at[order].set(x.reshape(rows, *x.shape[2:])) for x in out))


def _attend_rows(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    cache_positions: jax.Array,
    rows: jax.Array | None,
    key_limit: int,
    block: int,
) -> Partial:
    """Returns attention of R rows to their cache rows, block by block up to `key_limit` or the end of the longest.

    Args:
        q: [R, T, N, H].
        cache: of all layers and rows.
        layer: scalar, the layer's number.
        config: of the model.
        window: of the layer.
        cache_positions: [R, T], the tokens' positions in the cache.
        rows: [R], the cache rows; None: all, in their order.
        key_limit: see `CacheWrite`.
        block: cache positions of a block.
    """
    H = q.shape[-1]

    def add_block(i, partial):
        part = _read_block(cache, layer, rows, i, block)
        k, v = (x[:, 0] if cache.tile else split_heads(x, H) for x in (part.k, part.v))
        return partial.update(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            cached_mask(cache_positions, i * block + jnp.arange(block), window),
            config,
            k_scale=part.k_scale,
            v_scale=part.v_scale,
            layout="tiles" if cache.tile else "rows",
        )

    start = Partial.init(q, cache.k.shape[3] // (1 if cache.tile else H))
    if block == cache.length:
        return add_block(0, start)
    if not key_limit:
        return jax.lax.fori_loop(0, jnp.max(cache_positions) // block + 1, add_block, start)
    blocks = min(-(-key_limit // block), cache.length // block)
    return jax.lax.fori_loop(0, blocks, add_block, start, unroll=blocks <= _UNROLLED_BLOCKS)


def _read_block(cache: KVCache, layer: jax.Array, rows: jax.Array | None, i: jax.Array, block: int) -> KVCache:
    """Returns block i of cache rows [R] of one layer: arrays [R, C, ...]; of tiled keys and values [R, 1, ...]."""

    def read(x: jax.Array, row: jax.Array | int, count: int) -> jax.Array:
        size = x.shape[2] * block // cache.length
        start = layer, row, i * size, *(0,) * (x.ndim - 3)
        return jax.lax.dynamic_slice(x, start, (1, count, size, *x.shape[3:]))[0]

    if rows is None:
        return jax.tree.map(lambda x: read(x, 0, x.shape[1]), cache)
    return jax.tree.map(lambda x: jax.vmap(lambda row: read(x, row, 1)[0])(rows), cache)
