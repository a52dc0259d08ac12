"""Converts KV caches between flat and tiled layouts."""

import jax
import jax.numpy as jnp

from isheep_jax.model.kv_cache import KVCache


def in_tiles(cache: KVCache, tile: int, head_dim: int) -> KVCache:
    """Returns a flat cache in tiles of so many cache positions; 0: as it is."""
    if not tile:
        return cache
    L, B, S, width = cache.k.shape
    k, v = (x.reshape(L, B, S // tile, tile, width // head_dim, head_dim) for x in (cache.k, cache.v))
    return cache.replace(k=jnp.transpose(k, (0, 1, 2, 4, 5, 3)), v=jnp.transpose(v, (0, 1, 2, 4, 3, 5)))


def flat(cache: KVCache) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, each [L, B, S, K * H]."""
    if not cache.tile:
        return cache.k, cache.v
    k, v = jnp.moveaxis(cache.k, 5, 3), jnp.moveaxis(cache.v, 4, 3)
    return tuple(x.reshape(*x.shape[:2], cache.length, -1) for x in (k, v))
