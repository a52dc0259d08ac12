"""Attention in plain XLA: the reference for the other implementations, and `Partial`, attention computed in parts.

B rows, T query tokens, S key positions, N query heads, K key-value heads, G = N / K, H head dim.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

# Logit of a key that a query may not see. Finite, so that a query without any key (padding) gives numbers, not NaN.
MASKED = -1e30
# Stand-in window for full attention: longer than any sequence.
NO_WINDOW = 2**30

# How the axes of keys and values are ordered, see `_EQUATIONS`.
KVLayout = Literal["rows", "shared", "tiles"]
# Equations of the attention logits and of the weighted values.
_EQUATIONS = {
    "rows": ("bkgth,bskh->bkgts", "bkgts,bskh->bkgth"),  # k, v [B, S, K, H]
    "shared": ("bkgth,skh->bkgts", "bkgts,skh->bkgth"),  # k, v [S, K, H], the same for all rows
    "tiles": ("bkgth,bkhs->bkgts", "bkgts,bksh->bkgth"),  # k [B, K, H, S], v [B, K, S, H]
}
_KV_HEADS_AXIS = {"rows": 2, "shared": 1, "tiles": 1}


@dataclass(frozen=True)
class AttentionConfig:
    """The constants of a model's attention.

    scale: factor of the attention logits; None: 1 / sqrt(H).
    softcap: bound c of the logits, as c tanh(logit / c) (Gemma 2 report, section 2); None: unbounded.
    windows: for each kind of layer, how many tokens a token sees, itself included; None: all.
    """

    scale: float | None = None
    softcap: float | None = None
    windows: tuple[int | None, ...] = (None,)

    def window(self, kind: jax.Array) -> jax.Array | int | None:
        """Returns the window of a kind of layer. kind: traced index into `windows`, unused if there is only one."""
        if len(self.windows) == 1:
            return self.windows[0]
        return jnp.asarray([NO_WINDOW if window is None else window for window in self.windows])[kind]


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, config: AttentionConfig
) -> jax.Array:
    """Returns grouped-query attention [B, T, N, H] in q's dtype, with a float32 softmax.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H] with N a multiple of K; query head n uses key head n // (N // K).
        v: [B, S, K, H].
        mask: [B or 1, T, S], true where a query may see a key.
        config: scale and softcap; windows are part of the mask.
    """
    weights = jax.nn.softmax(_attention_logits(q, k, mask, config), axis=-1).astype(v.dtype)  # [B, K, G, T, S]
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


class Partial(NamedTuple):
    """State of an online softmax (Milakov and Gimelshein 2018), in float32: attention to the keys seen so far."""

    max: jax.Array  # [B, K, G, T], the highest logit
    sum: jax.Array  # [B, K, G, T], sum of exp(logit - max)
    acc: jax.Array  # [B, K, G, T, H], sum of exp(logit - max) v

    @classmethod
    def init(cls, q: jax.Array, kv_heads: int) -> "Partial":
        """Returns the state of queries [B, T, N, H] that have seen no key."""
        B, T, N, H = q.shape
        shape = (B, kv_heads, N // kv_heads, T)
        return cls(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, H)))

    def update(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array,
        config: AttentionConfig,
        *,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
        layout: KVLayout = "rows",
    ) -> "Partial":
        """Returns attention to more keys as well. Keys that a query may not see do not change a bit of its state.

        Args:
            q: [B, T, N, H].
            k: keys, in the shape that `layout` says.
            v: values, likewise.
            mask: [B or 1, T or 1, S], true where a query may see a key.
            config: scale and softcap.
            k_scale: [B, S, K], factors of int8 keys; None: keys are floats.
            v_scale: [B, S, K], factors of int8 values; None: values are floats.
            layout: "rows" [B, S, K, H], "shared" [S, K, H], or "tiles" with k [B, K, H, S] and v [B, K, S, H].
        """
        logits = _attention_logits(q, k, mask, config, k_scale, layout)  # [B, K, G, T, S]
        maximum = jnp.maximum(self.max, logits.max(axis=-1))
        # A query that has seen nothing keeps a sum of 0, whatever exp(MASKED - MASKED) is.
        weights = jnp.where(mask[:, None, None], jnp.exp(logits - maximum[..., None]), 0.0)
        scaled = weights if v_scale is None else weights * _per_key(v_scale)
        new = jnp.einsum(_EQUATIONS[layout][1], scaled.astype(v.dtype), v, preferred_element_type=jnp.float32)
        decay = jnp.exp(self.max - maximum)
        return Partial(maximum, decay * self.sum + weights.sum(axis=-1), decay[..., None] * self.acc + new)

    def merge(self, other: "Partial") -> "Partial":
        """Returns attention to the keys of both."""
        maximum = jnp.maximum(self.max, other.max)
        a, b = jnp.exp(self.max - maximum), jnp.exp(other.max - maximum)
        return Partial(maximum, a * self.sum + b * other.sum, a[..., None] * self.acc + b[..., None] * other.acc)

    def finalize(self, dtype: jnp.dtype) -> jax.Array:
        """Returns the attention [B, T, N, H]; 0 where a query has seen no key."""
        B, K, G, T, H = self.acc.shape
        out = self.acc / jnp.maximum(self.sum, jnp.finfo(jnp.float32).tiny)[..., None]
        return jnp.moveaxis(out, 3, 1).reshape(B, T, K * G, H).astype(dtype)


def packed_mask(
    length: int,
    segment_ids: jax.Array | None,
    window: int | jax.Array | None = None,
    queries: jax.Array | None = None,
) -> jax.Array:
    """Returns the mask [B, Q, T] of packed rows: causal within a row and, given segment ids, within a segment.

    A token is earlier than another by its index in the row, so positions may restart with each segment.

    Args:
        length: T.
        segment_ids: [B, T]; None: each row is one segment, and B is 1.
        window: tokens that a token sees, itself included; None: all.
        queries: [Q], indices of the querying tokens; None: all, Q is T.
    """
    distance = (jnp.arange(length) if queries is None else queries)[:, None] - jnp.arange(length)  # [Q, T]
    causal = (distance >= 0)[None] if window is None else ((distance >= 0) & (distance < window))[None]
    if segment_ids is None:
        return causal
    query_segments = segment_ids if queries is None else segment_ids[:, queries]
    return causal & (query_segments[:, :, None] == segment_ids[:, None, :])


def windowed_mask(
    mask: jax.Array, positions: jax.Array, key_positions: jax.Array, window: int | jax.Array | None
) -> jax.Array:
    """Returns a mask [B or 1, T or 1, S] without the keys that lie before a query's window.

    Args:
        mask: [B or 1, T or 1, S], true where a query may see a key.
        positions: [B, T], of the queries in the sequence.
        key_positions: [B or 1, S].
        window: tokens that a token sees, itself included; None: all.
    """
    return mask if window is None else mask & (positions[:, :, None] - key_positions[:, None, :] < window)


def cached_mask(
    query_positions: jax.Array, key_positions: jax.Array, window: int | jax.Array | None = None
) -> jax.Array:
    """Returns the mask [B, T, S] of a cache: a query sees the cache positions up to its own, the last `window` of them.

    Args:
        query_positions: [B, T].
        key_positions: [S].
        window: tokens that a token sees, itself included; None: all.
    """
    last = query_positions[:, :, None]
    return key_positions <= last if window is None else (key_positions <= last) & (key_positions > last - window)


def _per_key(scale: jax.Array) -> jax.Array:
    """Returns factors of keys [B, S, K] in the axes of attention logits, as [B, K, 1, 1, S]."""
    return jnp.moveaxis(scale, 1, 2)[:, :, None, None]


def _attention_logits(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array,
    config: AttentionConfig,
    k_scale: jax.Array | None = None,
    layout: KVLayout = "rows",
) -> jax.Array:
    """Returns attention logits [B, K, G, T, S] in float32, `MASKED` where the mask is false."""
    B, T, _, H = q.shape
    K = k.shape[_KV_HEADS_AXIS[layout]]
    # With the axes in the order of the logits, XLA multiplies with the keys without transposing them.
    grouped = jnp.moveaxis(q.reshape(B, T, K, -1, H), 1, 3)  # [B, K, G, T, H]
    logits = jnp.einsum(_EQUATIONS[layout][0], grouped, k, preferred_element_type=jnp.float32)
    logits *= 1 / math.sqrt(H) if config.scale is None else config.scale
    if k_scale is not None:
        logits *= _per_key(k_scale)
    if config.softcap is not None:
        logits = config.softcap * jnp.tanh(logits / config.softcap)
    return jnp.where(mask[:, None, None], logits, MASKED)
