"""What tokens attend to: the earlier ones of a packed row, or of a cache, and keys that are given beside them.

By platform: Pallas kernels on TPUs, loops over blocks on CPUs, the reference on GPUs. Letters as in `attention`.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from isheep_jax.model.attention_reference import Partial, attention, cached_mask, packed_mask
from isheep_jax.model.kv_cache import KVCache, split_heads
from isheep_jax.sharding import ActivationSharding

# Keys of a block, and in packed rows also its queries. On a CPU a block and its scores stay in the cores' own caches:
# 512 packed tokens then take a quarter of the time. Where segments start at multiples of PACKED_KEYS, the sums over a
# segment's keys are the same wherever in a row it lies. A CPU's cache lies in tiles of as many keys as it reads at a
# time (see `KVCache`): flat, 64 rows of 160 or of 650 keys take twice as long.
PACKED_KEYS = 32
_SHARED_KEYS = 512
_CACHED_KEYS = {"cpu": 128}
_CACHED_KEYS_ELSEWHERE = 512
# Rows of a cache that a CPU reads as far as the longest of them goes, in the order of their lengths: where 64 rows have
# 160 keys on average and the longest 380, this takes three fifths of the time.
_CACHED_ROWS = 8

# Of a layer that sees all earlier tokens: longer than any context.
_NO_WINDOW = 2**30


def cached_keys(platform: str) -> int:
    """Keys of a cache that are read at a time, where its length is a multiple of this."""
    return _CACHED_KEYS.get(platform, _CACHED_KEYS_ELSEWHERE)


@flax.struct.dataclass
class Context:
    """Keys and values that tokens [B, T] see beside those of their own row or slot.

    cache: [L, B, S, K * H], or of one row for all. mask: [B or 1, T or 1, S]. positions: [B or 1, S], in the sequence.
    """

    cache: KVCache
    mask: jax.Array
    positions: jax.Array


@flax.struct.dataclass
class Scores:
    """How a layer scores keys. scale, softcap: as in `attention`. windows: of each kind of layer, None: no window."""

    scale: float = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False)
    windows: tuple[int | None, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> dict[str, float | None]:
        return {"scale": self.scale, "softcap": self.softcap}

    def window(self, kind: jax.Array) -> jax.Array | int | None:
        """Of a layer's kind, a traced index into the windows; it is not looked at when there is only one."""
        if len(self.windows) == 1:
            return self.windows[0]
        return jnp.asarray([_NO_WINDOW if window is None else window for window in self.windows])[kind]


def attend_packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kind: jax.Array,
    scores: Scores,
    *,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    contexts: list[tuple[Context, jax.Array, jax.Array]],
    differentiable: bool,
    activations: ActivationSharding,
) -> jax.Array:
    """Attention to the earlier tokens of the row, of the same segment, and to contexts. Returns [B, T, N, H].

    q: [B, T, N, H]. k, v: [B, T, K, H]. kind: of the layer. segment_ids, positions: [B, T]. contexts: each with the
    layer's keys and values [B or 1, S, K, H]. differentiable: leaves out what has no gradient.
    """
    if activations.platform == "tpu":
        own = _kernels(q, k, v, kind, scores, segment_ids, activations, partial=bool(contexts))
        if not contexts:
            return own
    elif activations.platform == "cpu" and not differentiable:
        own = _blocks(q, k, v, scores.window(kind), scores, segment_ids)
    else:
        mask = packed_mask(q.shape[1], segment_ids, scores.window(kind))
        if not contexts:
            return attention(q, k, v, mask, **scores.shape)
        own = Partial.none(q, k.shape[2]).add(q, k, v, mask, **scores.shape)
    return _with_contexts(own, q, kind, scores, positions, contexts, activations).result(q.dtype)


def attend_cached(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    kind: jax.Array,
    scores: Scores,
    *,
    positions: jax.Array,
    at: jax.Array,
    contexts: list[tuple[Context, jax.Array, jax.Array]],
    activations: ActivationSharding,
) -> jax.Array:
    """Attention of each row's tokens to the slots 0..at of its row of the cache, and to contexts. Returns [B, T, N, H].

    q: [B, T, N, H]. at, positions: [B, T], the tokens' slots and their places in the sequence. The cache is read block
    by block, as far as the longest row goes; blocks behind a row's end change nothing of it.
    """
    H, length = q.shape[-1], cache.length
    block = cache.tile or math.gcd(length, cached_keys(activations.platform))
    rows = cache.k.shape[1]
    window = scores.window(kind)

    def take(x, row, rows, i):
        """Block i of some rows of one of the cache's arrays, [rows, ...]."""
        size = x.shape[2] * block // length
        start = layer, row, i * size, *(0,) * (x.ndim - 3)
        return jax.lax.dynamic_slice(x, start, (1, rows, size, *x.shape[3:]))[0]

    def see(q, at, read):
        """What read(x, i) gives of block i of the cache's arrays [rows, block, ...], as far as the rows go."""

        def add(i, partial):
            found = jax.tree.map(lambda x: read(x, i), cache)
            k, v = (x[:, 0] if cache.tile else split_heads(x, H) for x in (found.k, found.v))
            shape = {"k_scale": found.k_scale, "v_scale": found.v_scale, "by_head": bool(cache.tile), **scores.shape}
            mask = cached_mask(at, i * block + jnp.arange(block), window)
            return partial.add(q, k.astype(q.dtype), v.astype(q.dtype), mask, **shape)

        none = Partial.none(q, cache.k.shape[3] // (1 if cache.tile else H))
        return add(0, none) if block == length else jax.lax.fori_loop(0, jnp.max(at) // block + 1, add, none)

    def see_some(some):
        return see(q[some], at[some], lambda x, i: jax.vmap(lambda row: take(x, row, 1, i)[0])(some))

    one_device = activations.mesh is None or activations.mesh.size == 1
    if activations.platform == "cpu" and one_device and rows % _CACHED_ROWS == 0 and rows > _CACHED_ROWS:
        order = jnp.argsort(jnp.max(at, axis=1))
        found = jax.lax.map(see_some, order.reshape(-1, _CACHED_ROWS))
        own = Partial(*(jnp.zeros((rows, *x.shape[2:])).at[order].set(x.reshape(rows, *x.shape[2:])) for x in found))
    else:
        own = see(q, at, lambda x, i: take(x, 0, rows, i))
    return _with_contexts(own, q, kind, scores, positions, contexts, activations).result(q.dtype)


def _with_contexts(own, q, kind, scores, positions, contexts, activations) -> Partial:
    window = scores.window(kind)
    for context, k, v in contexts:
        mask = context.mask
        if window is not None:
            mask = mask & (positions[:, :, None] - context.positions[:, None, :] < window)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        if k.shape[0] == 1:
            k, v = k[0], v[0]
        own = own.merge(
            _in_blocks(q, k, v, mask, scores)
            if activations.platform == "cpu"
            else Partial.none(q, k.shape[-2]).add(q, k, v, mask, **scores.shape)
        )
    return own


def _in_blocks(q, k, v, mask, scores) -> Partial:
    """`Partial.add` of all keys, some at a time.

    Keys of a row's own lie in rows of any length, of which their sums must not depend. Keys that all rows share are the
    same for every call with them: of these more are taken at a time, and for the queries of all rows together.
    """
    B, T = q.shape[:2]
    shared, size = k.ndim == 3, PACKED_KEYS
    if shared:
        size = min(_SHARED_KEYS, -(-len(k) // PACKED_KEYS) * PACKED_KEYS)
        q, k, v = q.reshape(1, B * T, *q.shape[2:]), k[None], v[None]
        if mask.shape[:2] != (1, 1):
            mask = jnp.broadcast_to(mask, (B, T, mask.shape[2])).reshape(1, B * T, -1)
    missing = -k.shape[1] % size
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, missing)))
    k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k, v))
    # Blocks [blocks, B, K, H, size] and [blocks, B, K, size, H].
    k, v = (x.reshape(len(x), -1, size, *x.shape[2:]) for x in (k, v))
    keys, values = jnp.transpose(k, (1, 0, 3, 4, 2)), jnp.transpose(v, (1, 0, 3, 2, 4))

    def add(i, partial):
        piece = jax.lax.dynamic_slice_in_dim(mask, i * size, size, axis=2)
        return partial.add(q, keys[i], values[i], piece, by_head=True, **scores.shape)

    found = jax.lax.fori_loop(0, len(keys), add, Partial.none(q, keys.shape[2]))
    if shared:
        found = Partial(*(jnp.moveaxis(x.reshape(*x.shape[1:3], B, T, *x.shape[4:]), 2, 0) for x in found))
    return found


def _kernels(q, k, v, kind, scores, segment_ids, activations, partial: bool) -> jax.Array | Partial:
    from isheep_jax.model.attention_splash import splash_attention  # Pallas takes a while to import

    settings = {"segment_ids": segment_ids, "mesh": activations.mesh, "rules": activations.rules, **scores.shape}
    kernels = [
        functools.partial(splash_attention, window=window, partial=partial, **settings) for window in scores.windows
    ]
    return kernels[0](q, k, v) if len(kernels) == 1 else jax.lax.switch(kind, kernels, q, k, v)


def _blocks(q, k, v, window, scores: Scores, segment_ids: jax.Array | None) -> Partial:
    """Blocks of queries, and for each the blocks of keys from the beginning of its first segment to its own."""
    B, T = q.shape[:2]
    size = PACKED_KEYS
    blocks = -(-T // size)
    padded = blocks * size
    segments = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, padded - T)), mode="edge")
    new = jnp.concatenate([jnp.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    begins = jax.lax.cummax(jnp.where(new, jnp.arange(padded), 0), axis=1)
    within = jnp.arange(size)[:, None] - jnp.arange(size)

    def block(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)

    def of_queries(i):
        queries, mine = block(q, i), block(segments, i)[:, :, None]

        def add(j, partial):
            distance = (i - j) * size + within
            mask = (distance >= 0) & (True if window is None else distance < window)
            mask = mask & (mine == block(segments, j)[:, None, :])
            return partial.add(queries, block(k, j), block(v, j), mask, **scores.shape)

        first = jnp.min(block(begins, i)) // size
        return jax.lax.fori_loop(first, i + 1, add, Partial.none(queries, k.shape[2]))

    if blocks == 1:
        found = of_queries(0)
    else:
        found = jax.lax.map(of_queries, jnp.arange(blocks))  # [blocks, B, K, G, size, ...]
        found = Partial(*(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], padded, *x.shape[5:]) for x in found))
    return Partial(*(x[:, :, :, :T] for x in found))
