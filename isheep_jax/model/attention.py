"""Attention: one function, shared by training, prefill, scoring and decoding."""

import math

import jax
import jax.numpy as jnp

# Finite, so that a row without any allowed key (padding) gives numbers and not NaN.
MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention with a float32 softmax (XLA; the reference for any other implementation).

    q: [B, T, N, H]. k, v: [B, S, K, H] with N a multiple of K; query head n uses key head n // (N // K).
    mask: [B, T, S], true where a query may see a key. scale: of the scores (None: 1 / sqrt(H)). softcap: bound c of the
    scores, as c tanh(score / c) (Gemma 2 report, section 2). Returns [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores *= 1 / math.sqrt(H) if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def packed_mask(positions: jax.Array, segment_ids: jax.Array | None, window: int | None = None) -> jax.Array:
    """[B, T, T]: causal within a row; with segment_ids [B, T] also within a segment.

    The order of a row decides what is earlier, so positions may restart with each segment. window: tokens that a token
    sees, itself included.
    """
    T = positions.shape[1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    causal = (distance >= 0)[None] if window is None else ((distance >= 0) & (distance < window))[None]
    if segment_ids is None:
        return jnp.broadcast_to(causal, (positions.shape[0], T, T))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cached_mask(positions: jax.Array, length: int, window: int | None = None) -> jax.Array:
    """[B, T, S]: a query at position p sees the cache slots 0..p of its row, the last `window` of them; S = length."""
    slots, last = jnp.arange(length), positions[:, :, None]
    return slots <= last if window is None else (slots <= last) & (slots > last - window)
