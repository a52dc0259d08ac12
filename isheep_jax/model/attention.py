"""Attention of a layer: chooses the implementation for the platform.

`packed_attention` serves training, prefill and scoring; `write_and_attend` serves decoding. Packed rows use Pallas
kernels on TPUs, cuDNN on GPUs, loops over blocks on CPUs where no gradient is needed, and the plain reference on CPUs
where one is. Decode steps use Pallas kernels on TPUs and GPUs, and loops over blocks elsewhere.

B rows, T query tokens, S key positions, N query heads, K key-value heads, H head dim.
"""

import math

import jax

from isheep_jax.model.attention_blockwise import blockwise_packed_attention, blockwise_prefix_attention
from isheep_jax.model.attention_cached import blockwise_cached_attention, cache_block
from isheep_jax.model.attention_gpu import KERNEL_BLOCK, compute_capability, gpu_packed_attention, kernel_refusal
from isheep_jax.model.attention_reference import (
    AttentionConfig,
    Partial,
    packed_mask,
    reference_attention,
    windowed_mask,
)
from isheep_jax.model.kv_cache import CacheWrite, KVCache, PrefixKV, split_heads, write_tokens
from isheep_jax.sharding import ActivationSharding


def packed_attention(
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

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H].
        v: [B, T, K, H].
        config: of the model.
        kind: scalar, the layer's index into `config.windows`.
        positions: [B, T], positions in the sequence.
        segment_ids: [B, T]; None: each row is one segment.
        prefix_kv: further keys and values, of this layer.
        differentiable: False allows implementations without a gradient.
        sharding: says which devices compute.
    """
    if sharding.platform == "gpu":
        return gpu_packed_attention(
            q,
            k,
            v,
            config,
            kind,
            positions=positions,
            segment_ids=segment_ids,
            prefix_kv=prefix_kv,
            differentiable=differentiable,
            sharding=sharding,
        )
    if sharding.platform == "tpu":
        from isheep_jax.model.attention_splash import splash_packed_attention  # Pallas takes a while to import

        attended = splash_packed_attention(q, k, v, config, kind, segment_ids, sharding, partial=bool(prefix_kv))
        if not prefix_kv:
            return attended
    elif sharding.platform == "cpu" and not differentiable:
        attended = blockwise_packed_attention(q, k, v, config, config.window(kind), segment_ids)
    else:
        mask = packed_mask(q.shape[1], segment_ids, config.window(kind))
        if not prefix_kv:
            return reference_attention(q, k, v, mask, config)
        attended = Partial.init(q, k.shape[2]).update(q, k, v, mask, config)
    return _merge_prefixes(attended, q, config, kind, positions, prefix_kv, sharding).finalize(q.dtype)


def write_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    write: CacheWrite,
    layer: jax.Array,
    config: AttentionConfig,
    kind: jax.Array,
    *,
    positions: jax.Array,
    prefix_kv: tuple[PrefixKV, ...],
    sharding: ActivationSharding,
) -> tuple[jax.Array, KVCache]:
    """Writes tokens to the cache; returns their attention as `cached_attention` does, and the cache.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H], the tokens' keys.
        v: [B, T, K, H], their values.
        write: the cache of all layers, and the tokens' positions in it.
        layer: scalar, the layer's number.
        config: of the model.
        kind: scalar, the layer's index into `config.windows`.
        positions: [B, T], positions in the sequence.
        prefix_kv: further keys and values, of this layer.
        sharding: says which devices compute.
    """
    is_step = q.shape[1] == 1
    if is_step and sharding.platform == "tpu" and decode_kernel_refusal(write.cache, q.shape[3], sharding) is None:
        from isheep_jax.model.attention_decode_tpu import kernel_cached_attention  # Pallas takes a while to import

        attended, cache = kernel_cached_attention(q, k, v, write, layer, config, config.window(kind), sharding)
        return _merge_prefixes(attended, q, config, kind, positions, prefix_kv, sharding).finalize(q.dtype), cache
    with jax.named_scope("cache_write"):
        cache = write_tokens(write, layer, k, v, sharding)
    attended = cached_attention(
        q,
        cache,
        layer,
        config,
        kind,
        positions=positions,
        cache_positions=write.positions,
        key_limit=write.key_limit,
        prefix_kv=prefix_kv,
        sharding=sharding,
    )
    return attended, cache


def cached_attention(
    q: jax.Array,
    cache: KVCache,
    layer: jax.Array,
    config: AttentionConfig,
    kind: jax.Array,
    *,
    positions: jax.Array,
    cache_positions: jax.Array,
    key_limit: int,
    prefix_kv: tuple[PrefixKV, ...],
    sharding: ActivationSharding,
) -> jax.Array:
    """Returns attention [B, T, N, H] to the row's cache positions up to the token's own, and to `prefix_kv`.

    Args:
        q: [B, T, N, H].
        cache: of all layers; the tokens' keys and values are already written.
        layer: scalar, the layer's number.
        config: of the model.
        kind: scalar, the layer's index into `config.windows`.
        positions: [B, T], positions in the sequence.
        cache_positions: [B, T], the tokens' positions in the cache; -1: padding.
        key_limit: see `CacheWrite`.
        prefix_kv: further keys and values, of this layer.
        sharding: says which devices compute.
    """
    window, is_step = config.window(kind), q.shape[1] == 1
    if is_step and sharding.platform == "gpu" and decode_kernel_refusal(cache, q.shape[3], sharding) is None:
        from isheep_jax.model.attention_decode_gpu import kernel_cached_attention  # Pallas takes a while to import

        attended = kernel_cached_attention(q, cache, layer, config, window, cache_positions, sharding)
    else:
        attended = blockwise_cached_attention(q, cache, layer, config, window, cache_positions, key_limit, sharding)
    return _merge_prefixes(attended, q, config, kind, positions, prefix_kv, sharding).finalize(q.dtype)


def decode_kernel_refusal(cache: KVCache, head_dim: int, sharding: ActivationSharding) -> str | None:
    """Returns why no kernel serves decode steps on a cache, or None if one does, which reads each sequence as it goes.

    Args:
        cache: of all layers, split as `sharding` says.
        head_dim: H.
        sharding: says which devices compute.
    """
    if sharding.platform == "gpu":
        return kernel_refusal(head_dim, cache.tile, cache.k_scale is not None, compute_capability(sharding.mesh))
    if sharding.platform == "tpu":
        from isheep_jax.model import attention_decode_tpu  # Pallas takes a while to import

        return attention_decode_tpu.kernel_refusal(cache, sharding)
    return "there is none for this platform"


def read_block(cache: KVCache, head_dim: int, sharding: ActivationSharding) -> int:
    """Returns how many cache positions a decode step reads at a time; arguments as in `decode_kernel_refusal`."""
    if decode_kernel_refusal(cache, head_dim, sharding) is not None:
        return cache.tile or math.gcd(cache.length, cache_block(sharding.platform))
    if sharding.platform == "gpu":
        return KERNEL_BLOCK
    from isheep_jax.model.attention_decode_tpu import block_length  # Pallas takes a while to import

    return block_length(cache.length, cache.k.shape[3] // sharding.mesh.shape[sharding.rules.kv_heads])


def _merge_prefixes(
    attended: Partial,
    q: jax.Array,
    config: AttentionConfig,
    kind: jax.Array,
    positions: jax.Array,
    prefix_kv: tuple[PrefixKV, ...],
    sharding: ActivationSharding,
) -> Partial:
    """Returns `attended` with attention to each of `prefix_kv` merged in; other arguments as in `packed_attention`."""
    window = config.window(kind)
    for prefix in prefix_kv:
        mask = windowed_mask(prefix.mask, positions, prefix.positions, window)
        k, v = (split_heads(x, q.shape[-1]).astype(q.dtype) for x in (prefix.cache.k, prefix.cache.v))
        if sharding.platform == "cpu":
            partial = blockwise_prefix_attention(q, k, v, mask, config)
        elif k.shape[0] == 1:
            partial = Partial.init(q, k.shape[2]).update(q, k[0], v[0], mask, config, layout="shared")
        else:
            partial = Partial.init(q, k.shape[2]).update(q, k, v, mask, config)
        attended = attended.merge(partial)
    return attended
