"""Attention without a cache on TPUs: JAX's Pallas kernels "splash attention", which never hold the scores in memory."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas_splash
from jax.sharding import Mesh, PartitionSpec

from isheep_jax.model.attention_reference import Partial
from isheep_jax.sharding import ShardingRules

# The kernels' unit along a row, and the longest piece of a row that they work on at a time.
LANES = 128
MAX_BLOCK = 512


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    mesh: Mesh | None,
    rules: ShardingRules,
    partial: bool = False,
    interpret: bool = False,
) -> jax.Array | Partial:
    """`attention` under `packed_mask`, with memory that is linear in T (Dao et al. 2022, arXiv 2205.14135).

    q: [B, T, N, H]. k, v: [B, T, K, H] with N a multiple of K. segment_ids: [B, T] or None; tokens see the earlier ones
    of their row, of the same segment. window: tokens that a token sees, itself included; None: all. scale: of the
    scores (None: 1 / sqrt(H)). softcap: bound c of the scores, as c tanh(score / c). interpret: runs the kernels
    without a TPU, slowly. Returns [B, T, N, H] in q's dtype, which has a gradient in q, k and v, but no second one; or,
    if partial, attention to which other keys can be added, without a gradient.

    Every device of the mesh (None: one device) computes its rows and heads: B is split over rules.batch, N and K
    over rules.heads, and each must be a multiple of its parts. T may be any length; the kernels see it rounded up to
    whole blocks.
    """
    if rules.heads != rules.kv_heads:
        raise ValueError(f"query heads are split over {rules.heads}, but key heads over {rules.kv_heads}")
    T, H = q.shape[1], q.shape[3]
    # The kernels know no scale. It is applied in float32, because bfloat16 would round the scale itself.
    q = (q.astype(jnp.float32) * (1 / math.sqrt(H) if scale is None else scale)).astype(q.dtype)
    block, padded = _blocks(T)
    heads = PartitionSpec(rules.batch, None, rules.heads, None)
    rows = PartitionSpec(rules.batch, None)

    def local(q, k, v, segment_ids):
        # The tokens behind the end of a row are later than all others, so none sees them, whatever their segment.
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - T), (0, 0), (0, 0))) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - T)))
            segment_ids = pallas_splash.SegmentIds(segment_ids, segment_ids)
        B, _, K, _ = k.shape
        group = q.shape[2] // K
        kernel = _kernel(padded, block, group, window, softcap, partial, interpret)
        # One kernel for the queries of each key head, which are consecutive: keys and values are not repeated. Mapped
        # over rather than inside the kernel, because only a mapped axis keeps both cores of a chip busy in the backward
        # pass.
        kernel = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))
        q = q.reshape(B, padded, K, group, H).transpose(0, 2, 3, 1, 4)
        out = kernel(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
        if partial:
            out, (log_mass,) = out
            log_mass = log_mass[..., :T].astype(jnp.float32)
            return Partial(log_mass, jnp.ones_like(log_mass), out[..., :T, :].astype(jnp.float32))
        return out.transpose(0, 3, 1, 2, 4).reshape(B, padded, K * group, H)[:, :T]

    if mesh is None:
        return local(q, k, v, segment_ids)
    in_specs = (heads, heads, heads, None if segment_ids is None else rows)
    out_specs = heads
    if partial:
        queries = PartitionSpec(rules.batch, rules.heads, None, None)
        out_specs = Partial(queries, queries, PartitionSpec(*queries, None))
    # The kernels do not say how their outputs vary over the mesh.
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(q, k, v, segment_ids)


def _blocks(length: int) -> tuple[int, int]:
    """The size of the pieces that a row is cut into, and the row's length when the last piece is full."""
    pieces = math.ceil(length / MAX_BLOCK)
    block = LANES * math.ceil(length / pieces / LANES)
    return block, pieces * block


def _kernel(
    length: int, block: int, heads: int, window: int | None, softcap: float | None, partial: bool, interpret: bool
):
    """Attention of `heads` query heads [heads, T, H] to the one key head [T, H] that they share."""
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
