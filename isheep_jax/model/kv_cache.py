"""Keys and values of earlier tokens: how they lie in memory, and how new ones are written.

Letters: L layers, B rows, S cache slots, T new tokens, K key heads, H head dim.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding

from isheep_jax.model.architecture import Architecture
from isheep_jax.model.quantized import quantize
from isheep_jax.sharding import ANYWHERE, ActivationSharding, Rules


@flax.struct.dataclass
class KVCache:
    """Keys and values of earlier tokens. The slot of a token is its position.

    Heads and their width share an axis: XLA pads an axis of heads of its own to what a TPU likes, and copies the whole
    cache where a chip's heads are no power of 2 (27 GiB per chip for 20 heads on 4 chips of a v5e; planned).

    k: [L, B, S, K * H], after RoPE.
    v: [L, B, S, K * H].
    k_scale, v_scale: [L, B, S, K] float32, of int8 keys and values, one for each token and head (see `quantized`); None
    where these are floats.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def length(self) -> int:
        return self.k.shape[2]


def init_cache(
    architecture: Architecture, batch: int, length: int, dtype: jnp.dtype, sharding: Sharding | None = None
) -> KVCache:
    """An empty cache for `batch` rows of `length` positions. dtype: int8 has scales."""
    shape = (architecture.layers, batch, length)
    width = architecture.kv_heads * architecture.head_dim
    numbers = [jnp.zeros((*shape, width), dtype, device=sharding) for _ in "kv"]
    if dtype != jnp.int8:
        return KVCache(*numbers)
    scales = [jnp.zeros((*shape, architecture.kv_heads), jnp.float32, device=sharding) for _ in "kv"]
    return KVCache(*numbers, *scales)


def cache_spec(rules: Rules) -> PartitionSpec:
    """How a cache is split: its rows as the batch, its heads as the key heads."""
    return PartitionSpec(None, rules["batch"], None, rules["kv_heads"])


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
    shards = 1 if activations.mesh is None else activations.mesh.shape[activations.rules["batch"]]
    rows = jnp.arange(at.shape[0])[:, None] if rows is None else rows
    rows = jnp.broadcast_to(rows % (cache.k.shape[1] // shards), at.shape)

    def write(cache, new, at, rows, layer):
        return cache.at[layer, rows, at].set(new.astype(cache.dtype).reshape(*at.shape, -1), mode="drop")

    if activations.mesh is not None:
        rules = activations.rules
        batch = PartitionSpec(rules["batch"])
        new = PartitionSpec(rules["batch"], None, rules["kv_heads"])
        write = jax.shard_map(
            write,
            mesh=activations.mesh,
            in_specs=(cache_spec(rules), new, batch, batch, PartitionSpec()),
            out_specs=cache_spec(rules),
        )
    new = KVCache(k, v)
    if cache.k_scale is not None:
        k, v = quantize(k, (3,)), quantize(v, (3,))
        new = KVCache(k.values, v.values, k.scale, v.scale)
    return jax.tree.map(lambda old, new: write(old, new, at, rows, layer), cache, new)


def split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """Keys or values [..., K * H] as [..., K, H]."""
    return x.reshape(*x.shape[:-1], -1, head_dim)
