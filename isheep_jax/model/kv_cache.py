"""Keys and values of earlier tokens: how they lie in memory, and how new ones are written.

Letters: L layers, B rows, S cache slots, T new tokens, K key heads, H head dim.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from isheep_jax.model.architecture import Architecture
from isheep_jax.sharding import ANYWHERE, ActivationSharding, Rules


@flax.struct.dataclass
class KVCache:
    """Keys and values of earlier tokens. The slot of a token is its position.

    Heads and their width share an axis: XLA pads an axis of heads of its own to what a TPU likes, and copies the whole
    cache where a chip's heads are no power of 2 (27 GiB per chip for 20 heads on 4 chips of a v5e; planned).

    k: [L, B, S, K * H], after RoPE.
    v: [L, B, S, K * H].
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        return self.k.shape[2]


def init_cache(architecture: Architecture, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `batch` rows of `length` positions."""
    shape = (architecture.layers, batch, length, architecture.kv_heads * architecture.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def cache_spec(rules: Rules) -> PartitionSpec:
    """How a cache is split: its rows as the batch, its heads as the key heads."""
    return PartitionSpec(None, rules["batch"], None, rules["kv_heads"])


def write_tokens(
    cache: KVCache,
    layer: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    activations: ActivationSharding = ANYWHERE,
) -> KVCache:
    """Writes a layer's new keys and values [B, T, K, H] to the slots `positions` [B, T]; outside 0..S-1 to none.

    Each device writes into its own rows: XLA does not see by itself that row b of the new ones goes to row b of the
    cache, and would gather keys, values and positions of all rows on every device.
    """
    # Negative indices would wrap; one past the end is dropped by the scatter.
    at = jnp.where(positions < 0, cache.length, positions)

    def write(cache, new, at, layer):
        rows = jnp.arange(at.shape[0])[:, None]
        return cache.at[layer, rows, at].set(new.astype(cache.dtype).reshape(*at.shape, -1), mode="drop")

    if activations.mesh is not None:
        rules = activations.rules
        new = PartitionSpec(rules["batch"], None, rules["kv_heads"])
        write = jax.shard_map(
            write,
            mesh=activations.mesh,
            in_specs=(cache_spec(rules), new, PartitionSpec(rules["batch"]), PartitionSpec()),
            out_specs=cache_spec(rules),
        )
    return KVCache(write(cache.k, k, at, layer), write(cache.v, v, at, layer))


def layer_of(cache: KVCache, layer: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values [B, S, K, H]."""

    def read(x):
        x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        return x.reshape(*x.shape[:2], -1, head_dim)

    return read(cache.k), read(cache.v)
