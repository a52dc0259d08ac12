"""Attention on GPUs: which kernel computes it; and packed rows, without the logits of whole rows in memory.

cuDNN's flash attention, through `jax.nn.dot_product_attention`, computes what it can (`cudnn_refusal` has its limits);
the rest is computed for a chunk of queries at a time.

B rows, T query tokens, P keys of prefixes, S = P + T keys, N query heads, K key-value heads, H head dim.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from isheep_jax.model.attention_reference import AttentionConfig, packed_mask, reference_attention, windowed_mask
from isheep_jax.model.kv_cache import PrefixKV, split_heads
from isheep_jax.sharding import ActivationSharding

# Queries whose logits exist at the same time where cuDNN cannot compute.
CHUNK = 256
# Cache positions that the kernel of `attention_decode_gpu` has in registers at a time.
KERNEL_BLOCK = 64
# The compute capability that it and cuDNN's attention need.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class AttentionShape:
    """What decides, before anything is computed, whether cuDNN can compute.

    masked: whether a mask says what a query may see; otherwise each row is one segment, seen causally.
    differentiable: whether there will be a gradient.
    """

    dtype: jnp.dtype
    queries: int
    keys: int
    heads: int
    head_dim: int
    softcap: float | None
    masked: bool
    differentiable: bool


def cudnn_refusal(shape: AttentionShape, capability: tuple[int, int] | None) -> str | None:
    """Returns why cuDNN cannot compute attention of this shape, or None if it can.

    The limits are those that `jax.nn.dot_product_attention` states and checks, and one of memory: a mask has the square
    of a row, and may take no more than the row's queries.

    Args:
        shape: what is to be computed.
        capability: compute capability of the GPU, see `compute_capability`.
    """
    if capability is None or capability < LEAST_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not in {jnp.dtype(shape.dtype).name}"
    if shape.softcap is not None:
        return "it has no bound of the logits (softcap)"
    widest = 256 if capability >= (9, 0) and not shape.differentiable else 128
    if shape.head_dim % 8 or shape.head_dim > widest:
        return f"its heads have a multiple of 8 and at most {widest} dimensions, not {shape.head_dim}"
    if shape.masked and shape.differentiable and (shape.queries % 2 or shape.keys % 2):
        return f"with a mask, its gradient needs even lengths, not {shape.queries} and {shape.keys}"
    if shape.masked and shape.keys > shape.heads * shape.head_dim:
        return f"a mask over {shape.keys} keys is larger than the queries"
    return None


def kernel_refusal(head_dim: int, tile: int, is_int8: bool, capability: tuple[int, int] | None) -> str | None:
    """Returns why the kernel of `attention_decode_gpu` cannot attend to a cache in a decode step, or None if it can.

    Args:
        head_dim: H.
        tile: cache positions of a tile.
        is_int8: whether the cache holds integers.
        capability: compute capability of the GPU, see `compute_capability`.
    """
    if capability is None or capability < LEAST_CAPABILITY:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if is_int8:
        return "it reads no integers"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return f"its heads have a power of two of 16 to 256 dimensions, not {head_dim}"
    if not tile or tile % KERNEL_BLOCK:
        return f"it reads tiles of a multiple of {KERNEL_BLOCK} positions, not {tile}"
    return None


def compute_capability(mesh: Mesh) -> tuple[int, int] | None:
    """Returns the compute capability of the GPUs, such as (9, 0) for an H100; None: they are not NVIDIA's."""
    version = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def gpu_packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    config: AttentionConfig,
    kind: jax.Array,
    *,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    prefix_kv: tuple[PrefixKV, ...],
    differentiable: bool,
    sharding: ActivationSharding,
) -> jax.Array:
    """Returns attention [B, T, N, H] to the earlier tokens of the row, of the same segment, and to `prefix_kv`.

    Arguments as in `attention.packed_attention`.
    """
    T = q.shape[1]
    for prefix in reversed(prefix_kv):
        before = (split_heads(x, q.shape[-1]).astype(q.dtype) for x in (prefix.cache.k, prefix.cache.v))
        k, v = (
            jnp.concatenate([jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])), own], axis=1)
            for x, own in zip(before, (k, v))
        )
    # A window that is longer than the row hides nothing.
    windows = {None if window is None or window >= k.shape[1] else window for window in config.windows}
    plain = segment_ids is None and not prefix_kv and len(windows) == 1
    shape = AttentionShape(
        dtype=q.dtype,
        queries=T,
        keys=k.shape[1],
        heads=q.shape[2],
        head_dim=q.shape[3],
        softcap=config.softcap,
        masked=not plain,
        differentiable=differentiable,
    )
    window = config.window(kind) if windows != {None} else None
    mask_of = functools.partial(_mask, positions, segment_ids, prefix_kv, window)
    if cudnn_refusal(shape, compute_capability(sharding.mesh)) is not None:
        return chunked_attention(q, k, v, mask_of, config)
    if plain:
        return cudnn_attention(q, k, v, None, config, sharding, causal=True, window=windows.pop())
    mask = jnp.broadcast_to(mask_of(0, T), (q.shape[0], T, k.shape[1]))
    return cudnn_attention(q, k, v, mask, config, sharding, causal=not prefix_kv)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    config: AttentionConfig,
    sharding: ActivationSharding,
    *,
    causal: bool,
    window: int | None = None,
) -> jax.Array:
    """Returns attention [B, T, N, H] computed by cuDNN; every device of the mesh computes its own rows and heads.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mask: [B, T, S], true where a query may see a key; None: all.
        config: scale.
        sharding: B is split over the batch's mesh axes, N and K over those of the heads.
        causal: whether a query sees the keys up to its own index only, which lets cuDNN skip the others.
        window: the last keys that a causal query sees; None: all. Only without a mask.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=config.scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    heads = PartitionSpec(sharding.rules.batch, None, sharding.rules.heads, None)
    if mask is None:
        arguments, specs = (q, k, v), (heads, heads, heads)
    else:
        arguments, specs = (q, k, v, mask[:, None]), (heads, heads, heads, PartitionSpec(sharding.rules.batch))

    def attend_local(q, k, v, mask=None):
        return attend(q, k, v, mask=mask)

    # cuDNN's calls do not say how their results vary over the mesh.
    return jax.shard_map(attend_local, mesh=sharding.mesh, in_specs=specs, out_specs=heads, check_vma=False)(*arguments)


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_of: Callable[[jax.Array | int, int], jax.Array],
    config: AttentionConfig,
) -> jax.Array:
    """Returns attention [B, T, N, H] computed for a chunk of queries at a time, in the backward pass as well.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        mask_of: (first, count) -> mask [B or 1, count, S] of so many queries from the first on.
        config: scale and softcap.
    """
    B, T = q.shape[:2]
    if T <= CHUNK:
        return reference_attention(q, k, v, mask_of(0, T), config)
    chunks = -(-T // CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * CHUNK - T), (0, 0), (0, 0)))

    @jax.checkpoint
    def attend(first: jax.Array) -> jax.Array:
        queries = jax.lax.dynamic_slice_in_dim(padded, first, CHUNK, axis=1)
        return reference_attention(queries, k, v, mask_of(first, CHUNK), config)

    out = jax.lax.map(attend, jnp.arange(chunks) * CHUNK)  # [chunks, B, CHUNK, N, H]
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * CHUNK, *q.shape[2:])[:, :T]


def _mask(
    positions: jax.Array,
    segment_ids: jax.Array | None,
    prefix_kv: tuple[PrefixKV, ...],
    window: jax.Array | int | None,
    first: jax.Array | int,
    count: int,
) -> jax.Array:
    """Returns the mask [B or 1, count, S] of the queries from `first` on: keys of the prefixes, then the row's own.

    Queries behind the end of the row see whatever the last ones see.
    """
    queries = jnp.minimum(first + jnp.arange(count), positions.shape[1] - 1)
    masks = []
    for prefix in prefix_kv:
        visible = prefix.mask if prefix.mask.shape[1] == 1 else prefix.mask[:, queries]
        masks.append(windowed_mask(visible, positions[:, queries], prefix.positions, window))
    masks.append(packed_mask(positions.shape[1], segment_ids, window, queries))
    B = max(len(mask) for mask in masks)
    return jnp.concatenate([jnp.broadcast_to(mask, (B, count, mask.shape[2])) for mask in masks], axis=2)
