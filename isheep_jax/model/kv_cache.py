"""The KV cache: the layout of the keys and values of earlier tokens, and how new ones are written.

L layers, B rows, S cache positions, C cache positions of a tile, T new tokens, K key-value heads, H head dim.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding

from isheep_jax.model.architecture import Architecture
from isheep_jax.model.quantization import quantize
from isheep_jax.sharding import ActivationSharding, ShardingRules


@flax.struct.dataclass
class KVCache:
    """Keys and values of earlier tokens, by cache position.

    Heads and their width share an axis: XLA would pad a separate axis of heads for a TPU, and copy the whole cache
    where a chip's number of heads is no power of 2 (27 GiB per chip for 20 heads on 4 chips of a v5e; planned). On
    CPUs and GPUs a cache may be stored in tiles, so that what is read at a time is in the layout that products take. A
    GPU's compiler would otherwise transpose all keys at the start and the end of every call, next to the cache (16 GiB
    for 128 rows of 2,048 positions of Llama 3 8B; planned).
    """

    k: jax.Array  # [L, B, S, K * H], after RoPE; in tiles [L, B, S / C, K, H, C]
    v: jax.Array  # [L, B, S, K * H]; in tiles [L, B, S / C, K, C, H]
    k_scale: jax.Array | None = None  # [L, B, S, K] float32, factors of int8 keys; None: keys are floats
    v_scale: jax.Array | None = None  # [L, B, S, K] float32, factors of int8 values

    @property
    def length(self) -> int:
        """Cache positions of a row, S."""
        return self.k.shape[2] * max(self.tile, 1)

    @property
    def tile(self) -> int:
        """Cache positions of a tile, C; 0: the cache is flat."""
        return self.k.shape[5] if self.k.ndim == 6 else 0


@flax.struct.dataclass
class CacheWrite:
    """The cache that a forward pass writes its tokens' keys and values to, and where.

    Without `rows` the tokens also attend to the cache: row b of the batch is cache row b, and a token sees the cache
    positions up to its own. With `rows` they only attend to each other, like prompts that are prefilled in packed rows.
    """

    cache: KVCache
    positions: jax.Array  # [B, T], cache positions; outside 0..S-1, such as -1 for padding, nothing is written
    rows: jax.Array | None = None  # [B, T], cache rows, on the same data shard as the token's row of the batch
    # Cache positions that are read: all `positions` are below it. 0: up to the highest position, found by the device.
    key_limit: int = flax.struct.field(pytree_node=False, default=0)
    # Tokens that a flat cache takes at once, from a position that is a multiple of it on. Sequences in a row begin at
    # multiples of it, so that a group begins with padding only if it has nothing else. Padding after a sequence is
    # written, too, to positions that the sequence overwrites before it sees them.
    group: int = flax.struct.field(pytree_node=False, default=1)


@flax.struct.dataclass
class PrefixKV:
    """Keys and values that tokens [B, T] attend to besides those of their own row."""

    cache: KVCache  # flat floats [L, B or 1, S, K * H], 1: shared by all rows; within a layer without L
    mask: jax.Array  # [B or 1, T or 1, S], true where a token may see a key
    positions: jax.Array  # [B or 1, S], positions in the sequence


def init_cache(
    architecture: Architecture,
    batch: int,
    length: int,
    dtype: jnp.dtype,
    sharding: Sharding | None = None,
    tile: int = 0,
) -> KVCache:
    """Returns an empty cache.

    Args:
        architecture: gives layers, heads and their width.
        batch: rows.
        length: cache positions of a row.
        dtype: of keys and values; int8 adds scales.
        sharding: of each array.
        tile: cache positions of a tile, a divisor of length; 0: flat.
    """
    shape = (architecture.layers, batch, length)
    K, H = architecture.kv_heads, architecture.head_dim
    k = v = (*shape, K * H)
    if tile:
        tiles = (architecture.layers, batch, length // tile, K)
        k, v = (*tiles, H, tile), (*tiles, tile, H)
    cache = KVCache(jnp.zeros(k, dtype, device=sharding), jnp.zeros(v, dtype, device=sharding))
    if dtype != jnp.int8:
        return cache
    k_scale, v_scale = (jnp.zeros((*shape, K), jnp.float32, device=sharding) for _ in range(2))
    return cache.replace(k_scale=k_scale, v_scale=v_scale)


def cache_spec(rules: ShardingRules) -> PartitionSpec:
    """Returns how a cache is split: its rows as the batch, its heads as the key-value heads."""
    return PartitionSpec(None, rules.batch, None, rules.kv_heads)


def write_tokens(
    write: CacheWrite, layer: jax.Array, k: jax.Array, v: jax.Array, sharding: ActivationSharding
) -> KVCache:
    """Returns the cache with a layer's new keys and values, quantized if it holds int8.

    Each device writes to its own rows. XLA would not notice that nothing needs to be sent, and would gather keys,
    values and positions of all rows on every device.

    Args:
        write: the cache and where the tokens go.
        layer: scalar, the layer's number.
        k: [B, T, K, H].
        v: [B, T, K, H].
        sharding: of the batch and the heads.
    """
    cache, positions, rows = write.cache, write.positions, write.rows
    # Negative indices would wrap; one past the end is dropped by the scatter.
    positions = jnp.where(positions < 0, cache.length, positions)
    rows = jnp.arange(positions.shape[0])[:, None] if rows is None else rows
    rows_per_shard = cache.k.shape[1] // sharding.batch_shards
    rows = jnp.broadcast_to(rows % rows_per_shard, positions.shape)

    batch = PartitionSpec(sharding.rules.batch)
    heads = PartitionSpec(sharding.rules.batch, None, sharding.rules.kv_heads)
    spec = cache_spec(sharding.rules)

    def scatter(old: jax.Array, new: jax.Array, tile_axis: int = 0) -> jax.Array:
        scatter_local = jax.shard_map(
            functools.partial(_scatter, tile=cache.tile, tile_axis=tile_axis, group=write.group),
            mesh=sharding.mesh,
            in_specs=(spec, heads, batch, batch, PartitionSpec()),
            out_specs=spec,
        )
        return scatter_local(old, new, positions, rows, layer)

    if cache.k_scale is None:
        return KVCache(scatter(cache.k, k, 5), scatter(cache.v, v, 4))
    k, v = quantize(k, (3,)), quantize(v, (3,))
    return KVCache(
        scatter(cache.k, k.values, 5),
        scatter(cache.v, v.values, 4),
        scatter(cache.k_scale, k.scale),
        scatter(cache.v_scale, v.scale),
    )


def _scatter(
    old: jax.Array,
    new: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    layer: jax.Array,
    *,
    tile: int,
    tile_axis: int,
    group: int,
) -> jax.Array:
    """Returns one array of a cache with new values written; positions outside of it are dropped.

    A TPU scatters row by row, at about the same time for a row of one position and of a group of them (as vLLM found by
    writing whole pages: vllm-project/vllm#13176).

    Args:
        old: the array, such as `KVCache.k`.
        new: [B, T, K, H], or scales [B, T, K].
        positions: [B, T], cache positions.
        rows: [B, T], cache rows.
        layer: scalar, the layer's number.
        tile: cache positions of a tile, where the array is in tiles.
        tile_axis: the array's axis of the positions within a tile.
        group: see `CacheWrite`.
    """
    if group > 1 and not tile:
        L, B, S, width = old.shape
        first, rows = positions[:, ::group], rows[:, ::group]
        groups = old.reshape(L, B, S // group, group, width)
        new = new.reshape(*first.shape, group, width).astype(old.dtype)
        return groups.at[layer, rows, first // group].set(new, mode="drop").reshape(old.shape)
    if old.ndim == 6:
        index = (layer, rows, positions // tile, *(slice(None),) * (tile_axis - 3), positions % tile)
    else:
        index = (layer, rows, positions)
        new = new.reshape(*positions.shape, -1)
    return old.at[index].set(new.astype(old.dtype), mode="drop")


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Returns keys or values [..., K * H] as [..., K, H]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
