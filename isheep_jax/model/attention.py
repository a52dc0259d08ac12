"""Attention: one function, shared by training, prefill, scoring and decoding."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.sharding import ANYWHERE, ActivationSharding

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
    mask: [B or 1, T, S], true where a query may see a key. scale: of the scores (None: 1 / sqrt(H)). softcap: bound c
    of the scores, as c tanh(score / c) (Gemma 2 report, section 2). Returns [B, T, N, H] in q's dtype.
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


def packed_attention(
    length: int,
    segment_ids: jax.Array | None,
    windows: tuple[int | None, ...],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    activations: ActivationSharding = ANYWHERE,
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """`attention` without a cache, under `packed_mask`, by what suits the platform: a function of (q, k, v, kind).

    length: T of the rows. windows: of each kind of layer. kind: traced scalar, which of them a layer has; it is not
    looked at when there is only one. scale, softcap: as in `attention`.
    """
    settings = {"scale": scale, "softcap": softcap}
    if activations.platform != "tpu":
        masks = [packed_mask(length, segment_ids, window) for window in windows]
        return lambda q, k, v, kind: attention(q, k, v, one_of(masks, kind), **settings)
    from isheep_jax.model.splash import splash_attention  # Pallas takes a while to import

    settings |= {"segment_ids": segment_ids, "mesh": activations.mesh, "rules": activations.rules}
    kernels = [functools.partial(splash_attention, window=window, **settings) for window in windows]
    if len(kernels) == 1:
        return lambda q, k, v, kind: kernels[0](q, k, v)
    return lambda q, k, v, kind: jax.lax.switch(kind, kernels, q, k, v)


def packed_mask(length: int, segment_ids: jax.Array | None, window: int | None = None) -> jax.Array:
    """[B, T, T], B = 1 without segment_ids: causal within a row; with segment_ids [B, T] also within a segment.

    The order of a row decides what is earlier, so positions may restart with each segment. length: T. window: tokens
    that a token sees, itself included.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    causal = (distance >= 0)[None] if window is None else ((distance >= 0) & (distance < window))[None]
    return causal if segment_ids is None else causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cached_mask(positions: jax.Array, length: int, window: int | None = None) -> jax.Array:
    """[B, T, S]: a query at position p sees the cache slots 0..p of its row, the last `window` of them; S = length."""
    slots, last = jnp.arange(length), positions[:, :, None]
    return slots <= last if window is None else (slots <= last) & (slots > last - window)


def one_of(choices: list[Any], index: jax.Array) -> Any:
    """The `index`-th of trees of like arrays; index: traced scalar, not looked at when there is only one."""
    if len(choices) == 1:
        return choices[0]
    return jax.tree.map(lambda *each: jax.lax.dynamic_index_in_dim(jnp.stack(each), index, keepdims=False), *choices)
