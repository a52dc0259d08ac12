"""Attention of decode steps on GPUs: a kernel that reads each sequence's keys and values in place, as far as it goes.

XLA copies a block of the cache before each product that reads it, which makes three times the traffic of the cache, and
reads all sequences as far as the longest. (Splitting the softmax over blocks: Milakov and Gimelshein 2018.)

B rows, C cache positions of a tile, N query heads, K key-value heads, G = N / K, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from isheep_jax.model.attention_gpu import KERNEL_BLOCK
from isheep_jax.model.attention_reference import MASKED, NO_WINDOW, AttentionConfig, Partial
from isheep_jax.model.kv_cache import KVCache, cache_spec
from isheep_jax.sharding import ActivationSharding

# The tensor cores' products have at least so many rows.
_LEAST_QUERIES = 16


def kernel_cached_attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    cache_positions: jax.Array,
    sharding: ActivationSharding,
    *,
    interpret: bool = False,
) -> Partial:
    """Returns attention of each row's token to the row's cache positions up to its own.

    Args:
        q: [B, 1, N, H].
        cache: of all layers, in tiles.
        layer: scalar, the layer's number.
        config: scale and softcap.
        window: of the layer.
        cache_positions: [B, 1], the tokens' positions in the cache; a row at -1 sees nothing.
        sharding: B is split over the batch's mesh axes, N and K over those of the heads.
        interpret: runs without a GPU, slowly.
    """
    rules = sharding.rules
    scale = 1 / math.sqrt(q.shape[3]) if config.scale is None else config.scale
    layer_and_window = jnp.stack([layer, NO_WINDOW if window is None else window]).astype(jnp.int32)
    attend = functools.partial(_attend_local, scale=scale, softcap=config.softcap, interpret=interpret)
    queries = PartitionSpec(rules.batch, rules.heads, None, None)
    run = jax.shard_map(
        attend,
        mesh=sharding.mesh,
        in_specs=(
            PartitionSpec(rules.batch, None, rules.heads, None),
            cache_spec(rules),
            cache_spec(rules),
            PartitionSpec(),
            PartitionSpec(rules.batch),
        ),
        out_specs=Partial(queries, queries, PartitionSpec(*queries, None)),
        # Kernels do not say how their results vary over the mesh.
        check_vma=False,
    )
    return run(q, cache.k, cache.v, layer_and_window, cache_positions[:, 0])


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_and_window: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> Partial:
    """Returns attention of the rows and heads of one device.

    Args:
        q: [B, 1, N, H].
        k: [L, B, S / C, K, H, C].
        v: [L, B, S / C, K, C, H].
        layer_and_window: [2].
        last: [B], the last cache position that each row sees.
        scale: of the logits.
        softcap: of the logits.
        interpret: runs without a GPU.
    """
    B, _, N, H = q.shape
    K = k.shape[3]
    G = N // K
    rows = max(_LEAST_QUERIES, pl.next_power_of_2(G))
    grouped = jnp.pad(q.reshape(B, K, G, H), ((0, 0), (0, 0), (0, rows - G), (0, 0)))

    def per_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h: (b, h, *(0,) * len(shape)))

    maximum, total, acc = pl.pallas_call(
        functools.partial(_kernel, scale=scale, softcap=softcap),
        grid=(B, K),
        in_specs=[pl.BlockSpec(), pl.BlockSpec(), per_head(rows, H), pl.BlockSpec(), pl.BlockSpec()],
        out_specs=[per_head(rows), per_head(rows), per_head(rows, H)],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, rows), jnp.float32),
            jax.ShapeDtypeStruct((B, K, rows), jnp.float32),
            jax.ShapeDtypeStruct((B, K, rows, H), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="cached_attention",
    )(layer_and_window, last, grouped, k, v)
    return Partial(*(x[:, :, :G, None] for x in (maximum, total, acc)))


def _kernel(
    layer_and_window_ref,
    last_ref,
    q_ref,
    k_ref,
    v_ref,
    max_ref,
    sum_ref,
    acc_ref,
    *,
    scale: float,
    softcap: float | None,
):
    """Attends from the queries [G, H] of a key head of a row to their keys, a block after the other."""
    row, head = pl.program_id(0), pl.program_id(1)
    layer, window, last = layer_and_window_ref[0], layer_and_window_ref[1], last_ref[row]
    q = q_ref[...]
    blocks_of_tile = k_ref.shape[-1] // KERNEL_BLOCK

    def add_block(i, state):
        maximum, total, acc = state
        tile, positions = i // blocks_of_tile, pl.ds(i % blocks_of_tile * KERNEL_BLOCK, KERNEL_BLOCK)
        k = k_ref[layer, row, tile, head, :, positions]  # [H, block]
        v = v_ref[layer, row, tile, head, positions, :]  # [block, H]
        logits = jnp.dot(q, k.astype(q.dtype), preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        position = i * KERNEL_BLOCK + jnp.arange(KERNEL_BLOCK)
        visible = ((position <= last) & (position > last - window))[None]
        logits = jnp.where(visible, logits, MASKED)
        new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=-1))
        weights = jnp.where(visible, jnp.exp(logits - new_maximum[:, None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        new = jnp.dot(weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32)
        return new_maximum, decay * total + jnp.sum(weights, axis=-1), decay[:, None] * acc + new

    rows, H = q.shape
    start = jnp.full((rows,), MASKED, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, H), jnp.float32)
    first = jnp.maximum(last - window + 1, 0) // KERNEL_BLOCK
    # Blocks behind the last one are not read; a row at -1 reads none.
    state = jax.lax.fori_loop(first, (last + KERNEL_BLOCK) // KERNEL_BLOCK, add_block, start)
    max_ref[...], sum_ref[...], acc_ref[...] = state
