"""The forward pass, shared by training, prefill, scoring and decoding: pure functions on the parameter tree.

Letters: B rows, T tokens, S cache slots, D model, F feed-forward, N query heads, K key heads, H head dim, V vocabulary,
L layers, R LoRA rank.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from isheep_jax.model.architecture import Architecture, AttentionKind, RopeScaling
from isheep_jax.model.attention import Context, Scores, attend_cached, attend_packed
from isheep_jax.model.kv_cache import KVCache, split_heads, write_tokens
from isheep_jax.model.quantization import Quantized, look_up, product
from isheep_jax.sharding import ANYWHERE, ActivationSharding

# For each linear leaf: the letters of its input, of its weights' input and output sides, and of its output.
_LINEAR = {
    "wq": ("btd", "d", "nh", "btnh"),
    "wk": ("btd", "d", "kh", "btkh"),
    "wv": ("btd", "d", "kh", "btkh"),
    "wo": ("btnh", "nh", "d", "btd"),
    "w_gate": ("btd", "d", "f", "btf"),
    "w_up": ("btd", "d", "f", "btf"),
    "w_down": ("btf", "f", "d", "btd"),
}
LINEAR_LEAVES = tuple(_LINEAR)

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def forward(
    params: dict[str, Any],
    architecture: Architecture,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    at: jax.Array | None = None,
    rows: jax.Array | None = None,
    contexts: tuple[Context, ...] = (),
    collect: bool = False,
    differentiable: bool = True,
    lora: dict[str, Any] | None = None,
    lora_scale: float = 1.0,
    lora_dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    compute_dtype: jnp.dtype = jnp.bfloat16,
    remat: Literal["none", "full"] = "none",
    activations: ActivationSharding = ANYWHERE,
) -> tuple[jax.Array, KVCache | None]:
    """Hidden states after the final norm.

    tokens: [B, T]. positions: [B, T], in their sequences, for RoPE and windows. The tokens of a row see the earlier
    ones of the row, of the same segment where segment_ids [B, T] are given (0 is padding). contexts: keys and values
    that they see beside those.

    cache: gets the keys and values of the tokens, in the slots at [B, T] (None: positions; outside 0..S-1, such as -1
    for padding, nothing is written) of its rows [B, T]. rows None: token row b is cache row b, and its tokens see the
    slots 0..at of that row, whether T is 1 (decode) or more. collect: without a cache, the keys and values of the
    tokens come back as one of T slots, in the order of the row. differentiable: False where no gradient is needed.

    lora: {"layers": {"wq": {"a": [L, D, R], "b": [L, R, N, H]}, ...}} adds lora_scale * x a b to those linear leaves
    (Hu et al. 2021); with a dropout_key (two uint32), lora_dropout of x is dropped before a. activations: where they
    lie.

    Returns ([B, T, D] in compute_dtype, the cache with the new tokens or None).
    """
    a, traits = architecture, architecture.traits
    # Each device looks its columns up for the rows of all that share a copy of the table, which is never gathered.
    x = activations.columns(look_up(params["embed"], activations.tokens(tokens), compute_dtype))
    if traits.scaled_embeddings:
        x *= jnp.asarray(math.sqrt(a.hidden_size), compute_dtype)
    kinds, kind_of_layer = a.attention_kinds
    angles = [_rope_angles(positions, a.head_dim, kind) for kind in kinds]
    scores = Scores((a.query_scalar or a.head_dim) ** -0.5, a.attention_softcap, tuple(kind.window for kind in kinds))
    at = positions if at is None else at

    def layer(carry, inputs):
        x, cache = carry
        weights, adapters, beside, index, kind = inputs
        x = activations.rows(x)
        cos, sin = _one_of(angles, kind)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return rms_norm(x, weights[name], a.norm_eps, traits.norm_offset) if name in weights else x

        def linear(name: str, x: jax.Array) -> jax.Array:
            into, inside, outside, out = _LINEAR[name]
            y = product(f"{into},{inside}{outside}->{out}", x, weights[name], compute_dtype)
            if adapters is not None and name in adapters:
                low = x
                if dropout_key is not None and lora_dropout > 0:
                    purpose = index * len(LINEAR_LEAVES) + LINEAR_LEAVES.index(name)
                    kept = kept_by_dropout(dropout_key, purpose, x.shape, lora_dropout)
                    low = jnp.where(kept, x / (1 - lora_dropout), 0).astype(x.dtype)
                low = jnp.einsum(f"{into},{inside}r->btr", low, adapters[name]["a"].astype(compute_dtype))
                y += lora_scale * jnp.einsum(f"btr,r{outside}->{out}", low, adapters[name]["b"].astype(compute_dtype))
            return y

        h = norm("attn_norm", x)
        q, k, v = linear("wq", h), linear("wk", h), linear("wv", h)
        if traits.qkv_bias:
            q, k, v = (y + weights[b].astype(compute_dtype) for y, b in ((q, "bq"), (k, "bk"), (v, "bv")))
        q, k = _rotate(norm("q_norm", q), cos, sin), _rotate(norm("k_norm", k), cos, sin)
        see = {
            "positions": positions,
            "contexts": [
                (context, split_heads(seen.k, a.head_dim), split_heads(seen.v, a.head_dim))
                for context, seen in zip(contexts, beside)
            ],
            "activations": activations,
        }
        if cache is not None:
            # The cache rides in the carry and only the new slots are written, so that a decode step does not rewrite a
            # layer's whole cache.
            cache = write_tokens(cache, index, k, v, at, rows, activations)
        if cache is not None and rows is None:
            attended = attend_cached(q, cache, index, kind, scores, at=at, **see)
        else:
            see |= {"segment_ids": segment_ids, "differentiable": differentiable}
            attended = attend_packed(q, k, v, kind, scores, **see)
        collected = KVCache(*(y.reshape(*y.shape[:2], -1) for y in (k, v))) if collect else None
        x = x + norm("attn_post_norm", linear("wo", attended))
        h = norm("mlp_norm", x)
        h = linear("w_down", activate(linear("w_gate", h)) * linear("w_up", h))
        return (activations.rows(x + norm("mlp_post_norm", h)), cache), collected

    activate = _ACTIVATIONS[traits.activation]
    adapters = None if lora is None else lora["layers"]
    beside = tuple(context.cache for context in contexts)
    inputs = (params["layers"], adapters, beside, jnp.arange(a.layers), jnp.asarray(kind_of_layer))
    # A scan keeps the two passes apart by itself, so that XLA need not be kept from sharing work between them.
    body = jax.checkpoint(layer, prevent_cse=False) if remat == "full" else layer
    (x, cache), collected = jax.lax.scan(body, (x, cache), inputs)
    return rms_norm(x, params["final_norm"], a.norm_eps, traits.norm_offset), collected if collect else cache


def logits(
    params: dict[str, Any], architecture: Architecture, hidden: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D] (after the final norm)."""
    return head_logits(output_head(params, architecture), architecture, hidden, compute_dtype)


def output_head(params: dict[str, Any], architecture: Architecture) -> jax.Array | Quantized:
    """What hidden states are multiplied with: [V, D] of tied embeddings, else [D, V]."""
    return params["embed" if architecture.tied_embeddings else "lm_head"]


def head_logits(
    head: jax.Array | Quantized, architecture: Architecture, hidden: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """`logits` by a head that stands by itself."""
    letters = "...d,vd->...v" if architecture.tied_embeddings else "...d,dv->...v"
    scores = product(letters, hidden.astype(compute_dtype), head, compute_dtype, preferred_element_type=jnp.float32)
    cap = architecture.logit_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def kept_by_dropout(key: jax.Array, purpose: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Which elements dropout leaves, [*shape] bool: the same on every mesh. key: two uint32; purpose: a number.

    Each element's number is hashed twice with MurmurHash3's finalizer (Appleby). JAX's own generator is expanded at
    every use, and a training step with its 7 masks took 8 times as long to compile.
    """
    number = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        number = number * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = _mixed(key.astype(jnp.uint32) + purpose.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
    return _mixed(_mixed(number ^ first) + second) >= jnp.uint32(round(rate * 2**32))


def _mixed(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the axes of `weight`, the last of x; computed in float32.

    x: [..., *weight.shape]; it is scaled by offset + weight.
    """
    y = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Radians per position [H / 2] (Su et al. 2021), stretched as `RopeScaling` says."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * jnp.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _rope_angles(positions: jax.Array, head_dim: int, kind: AttentionKind) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H / 2] in float32."""
    angles = positions[:, :, None, None] * rope_frequencies(head_dim, kind.rope_theta, kind.rope_scaling)
    return jnp.cos(angles), jnp.sin(angles)


def _one_of(choices: list[Any], index: jax.Array) -> Any:
    """The `index`-th of trees of like arrays; index: traced scalar, not looked at when there is only one."""
    if len(choices) == 1:
        return choices[0]
    return jax.tree.map(lambda *each: jax.lax.dynamic_index_in_dim(jnp.stack(each), index, keepdims=False), *choices)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE on [B, T, heads, H]; the halves of a head are the two coordinates, as in Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
