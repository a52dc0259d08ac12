"""Attention: the reference, and attention that is put together from parts of the keys.

Letters: B rows, T queries, S keys, N query heads, K key heads, G = N / K, H head dim.
"""

import math
from typing import NamedTuple

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
    """Grouped-query attention with a float32 softmax (XLA; the reference for all others).

    q: [B, T, N, H]. k, v: [B, S, K, H] with N a multiple of K; query head n uses key head n // (N // K).
    mask: [B or 1, T, S], true where a query may see a key. scale: of the scores (None: 1 / sqrt(H)). softcap: bound c
    of the scores, as c tanh(score / c) (Gemma 2 report, section 2). Returns [B, T, N, H] in q's dtype.
    """
    weights = jax.nn.softmax(_scores(q, k, mask, scale, softcap), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


class Partial(NamedTuple):
    """Attention to some of the keys, in float32, to which others can be added (Milakov and Gimelshein 2018).

    top: the highest score [B, K, G, T]. mass: sum of exp(score - top) [B, K, G, T]. values: sum of exp(score - top) v
    [B, K, G, T, H].
    """

    top: jax.Array
    mass: jax.Array
    values: jax.Array

    @classmethod
    def none(cls, q: jax.Array, key_heads: int) -> "Partial":
        """Of queries [B, T, N, H] that have seen no key."""
        B, T, N, H = q.shape
        shape = (B, key_heads, N // key_heads, T)
        return cls(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, H)))

    def add(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
        by_head: bool = False,
    ) -> "Partial":
        """Attention to these keys as well; arguments as in `attention`, or k, v [S, K, H] that all rows share.

        k_scale, v_scale: [B, S, K], of keys and values of each row that are to be multiplied with them. by_head: k is
        [B, K, H, S] and v is [B, K, S, H]. Keys that a query may not see change nothing of it, not even by rounding.
        """
        keys, values = ("bkhs", "bksh") if by_head else ("bskh", "bskh") if k.ndim == 4 else ("skh", "skh")
        scores = _scores(q, k, mask, scale, softcap, k_scale, keys)
        top = jnp.maximum(self.top, scores.max(axis=-1))
        # A query that has seen nothing keeps a mass of 0, whatever exp(MASKED - MASKED) is.
        weights = jnp.where(mask[:, None, None], jnp.exp(scores - top[..., None]), 0.0)
        scaled = weights if v_scale is None else weights * _of_keys(v_scale)
        new = jnp.einsum(f"bkgts,{values}->bkgth", scaled.astype(v.dtype), v, preferred_element_type=jnp.float32)
        old = jnp.exp(self.top - top)
        return Partial(top, old * self.mass + weights.sum(axis=-1), old[..., None] * self.values + new)

    def merge(self, other: "Partial") -> "Partial":
        """Attention to the keys of both."""
        top = jnp.maximum(self.top, other.top)
        a, b = jnp.exp(self.top - top), jnp.exp(other.top - top)
        return Partial(top, a * self.mass + b * other.mass, a[..., None] * self.values + b[..., None] * other.values)

    def result(self, dtype: jnp.dtype) -> jax.Array:
        """[B, T, N, H]; 0 where a query has seen no key."""
        B, K, G, T, H = self.values.shape
        out = self.values / jnp.maximum(self.mass, jnp.finfo(jnp.float32).tiny)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(B, T, K * G, H).astype(dtype)


def packed_mask(length: int, segment_ids: jax.Array | None, window: int | jax.Array | None = None) -> jax.Array:
    """[B, T, T], B = 1 without segment_ids: causal within a row; with segment_ids [B, T] also within a segment.

    The order of a row decides what is earlier, so positions may restart with each segment. length: T. window: tokens
    that a token sees, itself included.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    causal = (distance >= 0)[None] if window is None else ((distance >= 0) & (distance < window))[None]
    return causal if segment_ids is None else causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cached_mask(positions: jax.Array, slots: jax.Array, window: int | jax.Array | None = None) -> jax.Array:
    """[B, T, S]: a query at position p [B, T] sees the slots [S] up to p, the last `window` of them."""
    last = positions[:, :, None]
    return slots <= last if window is None else (slots <= last) & (slots > last - window)


def _of_keys(scale: jax.Array) -> jax.Array:
    """Scales of keys [B, S, K] as those of scores [B, K, 1, 1, S]."""
    return jnp.moveaxis(scale, 1, 2)[:, :, None, None]


def _scores(q, k, mask, scale, softcap, k_scale=None, keys="bskh") -> jax.Array:
    """[B, K, G, T, S] in float32. keys: the axes of k."""
    B, T, _, H = q.shape
    # Axes in the order of the result's: XLA then multiplies with the keys as they lie.
    grouped = jnp.moveaxis(q.reshape(B, T, k.shape[keys.index("k")], -1, H), 1, 3)
    scores = jnp.einsum(f"bkgth,{keys}->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores *= 1 / math.sqrt(H) if scale is None else scale
    if k_scale is not None:
        scores *= _of_keys(k_scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask[:, None, None], scores, MASKED)
