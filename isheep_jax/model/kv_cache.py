"""Keys and values of earlier tokens: how they lie in memory, and how new ones are written.

Letters: L layers, B rows, S cache slots, C slots of a tile, T new tokens, K key heads, H head dim.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding

from isheep_jax.model.architecture import Architecture
from isheep_jax.model.quantization import quantize
from isheep_jax.sharding import ANYWHERE, ActivationSharding, ShardingRules


@flax.struct.dataclass
class KVCache:
    """Keys and values of earlier tokens. The slot of a token is its position.

    Heads and their width share an axis: XLA pads an axis of heads of its own to what a TPU likes, and copies the whole
    cache where a chip's heads are no power of 2 (27 GiB per chip for 20 heads on 4 chips of a v5e; planned). On a CPU a
    cache may lie in tiles: what is read at a time lies together, as its products take it.

    k: [L, B, S, K * H], after RoPE; in tiles [L, B, S / C, K, H, C].
    v: [L, B, S, K * H]; in tiles [L, B, S / C, K, C, H].
    k_scale, v_scale: [L, B, S, K] float32, of int8 keys and values, one for each token and head (see `quantized`); None
    where these are floats.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def length(self) -> int:
        return self.k.shape[2] * max(self.tile, 1)

    @property
    def tile(self) -> int:
        """Slots of a tile; 0: there are none."""
        return self.k.shape[5] if self.k.ndim == 6 else 0


def init_cache(
    architecture: Architecture,
    batch: int,
    length: int,
    dtype: jnp.dtype,
    sharding: Sharding | None = None,
    tile: int = 0,
) -> KVCache:
    """An empty cache for `batch` rows of `length` positions. dtype: int8 has scales. tile: divides length; 0: none."""
    shape = (architecture.layers, batch, length)
    K, H = architecture.kv_heads, architecture.head_dim
    k = v = (*shape, K * H)
    if tile:
        tiles = (architecture.layers, batch, length // tile, K)
        k, v = (*tiles, H, tile), (*tiles, tile, H)
    cache = KVCache(*(jnp.zeros(numbers, dtype, device=sharding) for numbers in (k, v)))
    if dtype != jnp.int8:
        return cache
    scales = [jnp.zeros((*shape, K), jnp.float32, device=sharding) for _ in "kv"]
    return KVCache(cache.k, cache.v, *scales)


def cache_spec(rules: ShardingRules) -> PartitionSpec:
    """How a cache is split: its rows as the batch, its heads as the key heads."""
    return PartitionSpec(None, rules.batch, None, rules.kv_heads)


def write_tokens(
    cache: KVCache,
    layer: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: jax.Array,
    rows: jax.Array | None = None,
    activations: ActivationSharding = ANYWHERE,
) -> KVCache:
    """Writes a layer's new keys and values [B, T, K, H] to slots of the cache, rounded if it is one of integers.

    at: [B, T], slots; outside 0..S-1 nothing is written. rows: [B, T], of the cache, on the device of the token's row;
    None: token rows are the cache's rows. Each device writes into its own rows: XLA does not see by itself that no keys
    need to travel, and would gather keys, values and slots of all rows on every device.
    """
    # Negative indices would wrap; one past the end is dropped by the scatter.
    at = jnp.where(at < 0, cache.length, at)
    shards = 1 if activations.mesh is None else activations.mesh.shape[activations.rules.batch]
    rows = jnp.arange(at.shape[0])[:, None] if rows is None else rows
    rows = jnp.broadcast_to(rows % (cache.k.shape[1] // shards), at.shape)

    def write(old, new, at, rows, layer, place):
        """place: axis of a tile's slots."""
        index = (layer, rows, at)
        if old.ndim == 6:
            index = (layer, rows, at // cache.tile, *(slice(None),) * (place - 3), at % cache.tile)
        else:
            new = new.reshape(*at.shape, -1)
        return old.at[index].set(new.astype(old.dtype), mode="drop")

    def write_split(old, new, place=0):
        put = functools.partial(write, place=place)
        if activations.mesh is not None:
            rules = activations.rules
            batch = PartitionSpec(rules.batch)
            heads = PartitionSpec(rules.batch, None, rules.kv_heads)
            put = jax.shard_map(
                put,
                mesh=activations.mesh,
                in_specs=(cache_spec(rules), heads, batch, batch, PartitionSpec()),
                out_specs=cache_spec(rules),
            )
        return put(old, new, at, rows, layer)

    if cache.k_scale is None:
        return KVCache(write_split(cache.k, k, 5), write_split(cache.v, v, 4))
    k, v = quantize(k, (3,)), quantize(v, (3,))
    return KVCache(
        write_split(cache.k, k.values, 5),
        write_split(cache.v, v.values, 4),
        write_split(cache.k_scale, k.scale),
        write_split(cache.v_scale, v.scale),
    )


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Keys or values [..., K * H] as [..., K, H]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
