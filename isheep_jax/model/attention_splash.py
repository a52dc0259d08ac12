"""Attention of packed rows on TPUs: JAX's Pallas kernels "splash attention", which never hold the logits in memory.

B rows, T query tokens, N query heads, K key-value heads, G = N / K, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas_splash
from jax.sharding import PartitionSpec

from isheep_jax.model.attention_reference import AttentionConfig, Partial
from isheep_jax.sharding import ActivationSharding

# Numbers in a row of a vector register. Blocks are multiples of it (tokens).
LANES = 128
# The longest block that a row is cut into (tokens).
MAX_BLOCK = 512


def splash_packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    config: AttentionConfig,
    kind: jax.Array,
    segment_ids: jax.Array | None,
    sharding: ActivationSharding,
    *,
    partial: bool = False,
) -> jax.Array | Partial:
    """Returns `splash_attention` with the window of a kind of layer.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H].
        v: [B, T, K, H].
        config: of the model.
        kind: scalar, index into `config.windows`.
        segment_ids: [B, T]; None: each row is one segment.
        sharding: says which devices compute.
        partial: returns a `Partial`.
    """
    kernels = [
        functools.partial(
            splash_attention, config=config, window=window, segment_ids=segment_ids, sharding=sharding, partial=partial
        )
        for window in config.windows
    ]
    return kernels[0](q, k, v) if len(kernels) == 1 else jax.lax.switch(kind, kernels, q, k, v)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    config: AttentionConfig,
    window: int | None,
    segment_ids: jax.Array | None,
    sharding: ActivationSharding,
    partial: bool = False,
    interpret: bool = False,
) -> jax.Array | Partial:
    """Returns attention under `packed_mask`, with memory that is linear in T (Dao et al. 2022, arXiv 2205.14135).

    Every device of the mesh computes its own rows and heads, which must divide over it. The result [B, T, N, H] in q's
    dtype has a gradient in q, k and v, but no second one; a `Partial` has none.

    Args:
        q: [B, T, N, H]; T may be any length, the kernels see it rounded up to whole blocks.
        k: [B, T, K, H] with N a multiple of K.
        v: [B, T, K, H].
        config: scale and softcap.
        window: tokens that a token sees, itself included; None: all.
        segment_ids: [B, T]; None: each row is one segment.
        sharding: B is split over the batch's mesh axes, N and K over those of the heads.
        partial: returns a `Partial`, to which other keys can be added.
        interpret: runs the kernels without a TPU, slowly.
    """
    rules = sharding.rules
    if rules.heads != rules.kv_heads:
        raise ValueError(f"query heads are split over {rules.heads}, but key heads over {rules.kv_heads}")
    scale = 1 / math.sqrt(q.shape[3]) if config.scale is None else config.scale
    # The kernels do not scale. The product is computed in float32, because bfloat16 would round the scale itself.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    attend = functools.partial(
        _attend_local, window=window, softcap=config.softcap, partial=partial, interpret=interpret
    )
    heads = PartitionSpec(rules.batch, None, rules.heads, None)
    in_specs = (heads, heads, heads, None if segment_ids is None else PartitionSpec(rules.batch, None))
    out_specs = heads
    if partial:
        queries = PartitionSpec(rules.batch, rules.heads, None, None)
        out_specs = Partial(queries, queries, PartitionSpec(*queries, None))
    # The kernels do not say how their outputs vary over the mesh.
    run = jax.shard_map(attend, mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(q, k, v, segment_ids)


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    partial: bool,
    interpret: bool,
) -> jax.Array | Partial:
    """Returns attention of the rows and heads of one device; arguments as in `splash_attention`."""
    T = q.shape[1]
    block, padded = _block_sizes(T)
    # Padding comes after all tokens, so none sees it, whatever its segment.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - T)))
        segment_ids = pallas_splash.SegmentIds(segment_ids, segment_ids)
    B, _, K, H = k.shape
    G = q.shape[2] // K
    kernel = _make_kernel(padded, block, G, window, softcap, partial, interpret)
    # One kernel for the queries of each key head, which are consecutive: keys and values are not repeated. Mapped over
    # rather than inside the kernel, because only a mapped axis keeps both cores of a chip busy in the backward pass.
    kernel = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))
    q = q.reshape(B, padded, K, G, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    out = kernel(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
    if partial:
        out, (logsumexp,) = out
        logsumexp = logsumexp[..., :T].astype(jnp.float32)
        return Partial(logsumexp, jnp.ones_like(logsumexp), out[..., :T, :].astype(jnp.float32))
    return out.transpose(0, 3, 1, 2, 4).reshape(B, padded, K * G, H)[:, :T]


def _block_sizes(length: int) -> tuple[int, int]:
    """Returns the size of the blocks that a row is cut into, and the row's length when the last block is full."""
    blocks = math.ceil(length / MAX_BLOCK)
    block = LANES * math.ceil(length / blocks / LANES)
    return block, blocks * block


def _make_kernel(
    length: int, block: int, heads: int, window: int | None, softcap: float | None, partial: bool, interpret: bool
):
    """Returns the kernel of the query heads [heads, T, H] that share one key-value head [T, H].

    Args:
        length: T, whole blocks.
        block: tokens of a block.
        heads: query heads.
        window: tokens that a token sees, itself included; None: all.
        softcap: as in `AttentionConfig`.
        partial: also returns the logarithms of the softmax denominators.
        interpret: runs without a TPU.
    """
    if window is None:
        mask = pallas_splash.CausalMask((length, length))
    else:
        mask = pallas_splash.LocalMask((length, length), (window - 1, 0), 0)
    return pallas_splash.make_splash_mqa(
        pallas_splash.MultiHeadMask([mask] * heads),
        block_sizes=pallas_splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        save_residuals=partial,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
