"""The decoder-only transformer: `forward` returns hidden states, `logits` the logits of the next tokens.

Training, prefill, scoring and decoding share these pure functions on the parameter tree (`architecture` has its table).
The layers are stacked on a leading axis and scanned.

B rows, T tokens, S cache positions, D model width, F feed-forward width, N query heads, K key-value heads, H head dim,
V vocabulary, L layers.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from isheep_jax.model.architecture import Architecture, AttentionKind, RopeScaling
from isheep_jax.model.attention import packed_attention, write_and_attend
from isheep_jax.model.attention_reference import AttentionConfig
from isheep_jax.model.kv_cache import CacheWrite, KVCache, PrefixKV, write_tokens
from isheep_jax.model.linear import LINEAR_RESULT, linear
from isheep_jax.model.quantization import Quantized, einsum, embedding_lookup
from isheep_jax.sharding import ActivationSharding, one_device_sharding

# How much of a layer is computed again in the backward pass, see `ForwardSetup`.
Remat = Literal["none", "selective", "full"]
_KEPT = {"selective": jax.checkpoint_policies.save_only_these_names(LINEAR_RESULT), "full": None}
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclass(frozen=True)
class ForwardSetup:
    """Static choices of a forward pass.

    compute_dtype: of activations and products.
    sharding: of activations; by default they are on one device.
    remat: "full" computes a layer's activations again in the backward pass instead of keeping them, "selective" all but
        the results of its linear layers (as Korthikanti et al. 2022, arXiv 2205.05198, do for attention).
    differentiable: False allows implementations without a gradient.
    """

    compute_dtype: jnp.dtype = jnp.bfloat16
    sharding: ActivationSharding = field(default_factory=one_device_sharding)
    remat: Remat = "none"
    differentiable: bool = True


@dataclass(frozen=True)
class ForwardInputs:
    """Inputs that all layers of one forward pass share, besides the hidden states."""

    architecture: Architecture
    setup: ForwardSetup
    attention: AttentionConfig
    rope: list[tuple[jax.Array, jax.Array]]  # cosines and sines [B, T, 1, H / 2] of each kind of layer
    positions: jax.Array  # [B, T], in the sequence
    segment_ids: jax.Array | None  # [B, T]
    prefix_kv: tuple[PrefixKV, ...]
    cache: CacheWrite | None  # where tokens are written; its own cache is only the initial one, the scan carries it
    collect_kv: bool


class Layer(NamedTuple):
    """One layer's slice of what the scan goes over."""

    weights: dict[str, Any]
    prefix_kv: tuple[KVCache, ...]  # keys and values of each of `ForwardInputs.prefix_kv`
    number: jax.Array  # scalar
    kind: jax.Array  # scalar, index into the architecture's attention kinds


def forward(
    params: dict[str, Any],
    architecture: Architecture,
    tokens: jax.Array,
    positions: jax.Array,
    setup: ForwardSetup,
    *,
    segment_ids: jax.Array | None = None,
    prefix_kv: tuple[PrefixKV, ...] = (),
    cache: CacheWrite | None = None,
    collect_kv: bool = False,
) -> tuple[jax.Array, KVCache | None]:
    """Returns hidden states after the final norm [B, T, D] in compute_dtype, and a KV cache or None.

    A token attends to the earlier tokens of its row and segment, or of its cache row, and to `prefix_kv`.

    Args:
        params: the parameter tree; a matrix of a layer may be an array, `Quantized` or `LoraWeight`.
        architecture: of the model.
        tokens: [B, T] int32.
        positions: [B, T] int32, positions in the sequence, for RoPE and windows.
        setup: static choices.
        segment_ids: [B, T] int32, the sequences packed in a row, 0 for padding; None: each row is one sequence.
        prefix_kv: keys and values that tokens attend to besides those of their row.
        cache: where keys and values are written, and whether the tokens attend to it (see `CacheWrite`); the returned
            cache is this one with the new tokens.
        collect_kv: without a `cache`, returns the tokens' keys and values [L, B, T, K * H] as a cache.
    """
    with jax.named_scope("embed"):
        x = embed(params, architecture, tokens, setup)  # [B, T, D]
    kinds, kind_of_layer = architecture.attention_kinds
    inputs = ForwardInputs(
        architecture=architecture,
        setup=setup,
        attention=attention_config(architecture),
        rope=[rope_rotation(positions, architecture.head_dim, kind) for kind in kinds],
        positions=positions,
        segment_ids=segment_ids,
        prefix_kv=prefix_kv,
        cache=cache,
        collect_kv=collect_kv,
    )
    layers = Layer(
        weights=params["layers"],
        prefix_kv=tuple(prefix.cache for prefix in prefix_kv),
        number=jnp.arange(architecture.layers),
        kind=jnp.asarray(kind_of_layer),
    )
    layer = functools.partial(decoder_layer, inputs)
    if setup.remat != "none":
        # In a scan XLA cannot share work between the two passes anyway, so that preventing it would only cost time.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=_KEPT[setup.remat])
    carry = x, None if cache is None else cache.cache
    (x, kv_cache), collected = jax.lax.scan(layer, carry, layers)
    with jax.named_scope("final_norm"):
        hidden = norm(architecture, x, params["final_norm"])
    return hidden, collected if collect_kv else kv_cache


def embed(params: dict[str, Any], architecture: Architecture, tokens: jax.Array, setup: ForwardSetup) -> jax.Array:
    """Returns the tokens' embeddings [B, T, D]."""
    # Each device looks up its own columns, for all rows of its replica of the weights, so the table is never gathered.
    tokens = setup.sharding.replica_sharded(tokens)
    x = setup.sharding.embed_sharded(embedding_lookup(params["embed"], tokens, setup.compute_dtype))
    if architecture.traits.scaled_embeddings:
        x *= jnp.asarray(math.sqrt(architecture.hidden_size), setup.compute_dtype)
    return x


def decoder_layer(
    inputs: ForwardInputs, carry: tuple[jax.Array, KVCache | None], layer: Layer
) -> tuple[tuple[jax.Array, KVCache | None], KVCache | None]:
    """Computes one layer, as a step of the scan over layers.

    The cache of all layers is carried and only the new positions are written, so that a decode step does not rewrite a
    layer's whole cache.

    Args:
        inputs: what all layers share.
        carry: hidden states [B, T, D], and the cache or None.
        layer: what this layer has of its own.

    Returns the new carry, and the tokens' keys and values [B, T, K * H] if they are collected.
    """
    x, cache = carry
    sharding = inputs.setup.sharding
    x = sharding.batch_sharded(x)
    with jax.named_scope("attention_block"):
        x, cache, kv = attention_block(inputs, layer, x, cache)
    with jax.named_scope("mlp_block"):
        x = mlp_block(inputs, layer, x)
    return (sharding.batch_sharded(x), cache), kv if inputs.collect_kv else None


def attention_block(
    inputs: ForwardInputs, layer: Layer, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, KVCache]:
    """Returns x [B, T, D] plus attention, the cache with the tokens written, and their keys and values [B, T, K * H].

    Args:
        inputs: what all layers share.
        layer: what this layer has of its own.
        x: [B, T, D], hidden states.
        cache: of all layers, or None.
    """
    architecture, weights = inputs.architecture, layer.weights
    dtype = inputs.setup.compute_dtype
    cos, sin = _select(inputs.rope, layer.kind)  # [B, T, 1, H / 2]
    h = norm(architecture, x, weights.get("attn_norm"))  # [B, T, D]
    with jax.named_scope("qkv"):
        q = linear("btd,dnh->btnh", h, weights["wq"], dtype)  # [B, T, N, H]
        k = linear("btd,dkh->btkh", h, weights["wk"], dtype)  # [B, T, K, H]
        v = linear("btd,dkh->btkh", h, weights["wv"], dtype)  # [B, T, K, H]
        if architecture.traits.qkv_bias:
            q, k, v = (y + weights[bias].astype(dtype) for y, bias in ((q, "bq"), (k, "bk"), (v, "bv")))
    with jax.named_scope("rope"):
        q = rotate(norm(architecture, q, weights.get("q_norm")), cos, sin)  # [B, T, N, H]
        k = rotate(norm(architecture, k, weights.get("k_norm")), cos, sin)  # [B, T, K, H]
    with jax.named_scope("attention"):
        attended, cache = attend(inputs, layer, q, k, v, cache)  # [B, T, N, H]
    with jax.named_scope("output"):
        h = linear("btnh,nhd->btd", attended, weights["wo"], dtype)  # [B, T, D]
    kv = KVCache(*(y.reshape(*y.shape[:2], -1) for y in (k, v)))  # [B, T, K * H]
    return x + norm(architecture, h, weights.get("attn_post_norm")), cache, kv


def attend(
    inputs: ForwardInputs, layer: Layer, q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """Returns attention [B, T, N, H], and the cache with the tokens written.

    Tokens attend to the cache if it is read (see `CacheWrite`), otherwise to those of their row.

    Args:
        inputs: what all layers share.
        layer: what this layer has of its own.
        q: [B, T, N, H].
        k: [B, T, K, H].
        v: [B, T, K, H].
        cache: of all layers, or None.
    """
    sharding = inputs.setup.sharding
    prefix_kv = tuple(
        prefix.replace(cache=layer_cache) for prefix, layer_cache in zip(inputs.prefix_kv, layer.prefix_kv)
    )
    write = None if inputs.cache is None else inputs.cache.replace(cache=cache)
    if write is not None and write.rows is None:
        return write_and_attend(
            q,
            k,
            v,
            write,
            layer.number,
            inputs.attention,
            layer.kind,
            positions=inputs.positions,
            prefix_kv=prefix_kv,
            sharding=sharding,
        )
    if write is not None:
        with jax.named_scope("cache_write"):
            cache = write_tokens(write, layer.number, k, v, sharding)
    attended = packed_attention(
        q,
        k,
        v,
        inputs.attention,
        layer.kind,
        positions=inputs.positions,
        segment_ids=inputs.segment_ids,
        prefix_kv=prefix_kv,
        differentiable=inputs.setup.differentiable,
        sharding=sharding,
    )
    return attended, cache


def mlp_block(inputs: ForwardInputs, layer: Layer, x: jax.Array) -> jax.Array:
    """Returns x [B, T, D] plus the gated feed-forward network."""
    architecture, weights = inputs.architecture, layer.weights
    dtype = inputs.setup.compute_dtype
    activate = _ACTIVATIONS[architecture.traits.activation]
    h = norm(architecture, x, weights.get("mlp_norm"))  # [B, T, D]
    gate = activate(linear("btd,df->btf", h, weights["w_gate"], dtype))  # [B, T, F]
    up = linear("btd,df->btf", h, weights["w_up"], dtype)  # [B, T, F]
    h = linear("btf,fd->btd", gate * up, weights["w_down"], dtype)  # [B, T, D]
    return x + norm(architecture, h, weights.get("mlp_post_norm"))


def logits(
    params: dict[str, Any], architecture: Architecture, hidden: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D] (after the final norm)."""
    return lm_head_logits(lm_head(params, architecture), architecture, hidden, compute_dtype)


def lm_head(params: dict[str, Any], architecture: Architecture) -> jax.Array | Quantized:
    """Returns the matrix that hidden states are multiplied with: [V, D] if embeddings are tied, otherwise [D, V]."""
    return params["embed" if architecture.tied_embeddings else "lm_head"]


def lm_head_logits(
    head: jax.Array | Quantized, architecture: Architecture, hidden: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """Returns `logits` for a given `lm_head`, such as a resharded one."""
    with jax.named_scope("lm_head"):
        equation = "...d,vd->...v" if architecture.tied_embeddings else "...d,dv->...v"
        y = einsum(equation, hidden.astype(compute_dtype), head, compute_dtype, result_dtype=jnp.float32)
        cap = architecture.logit_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)


def norm(architecture: Architecture, x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Returns the model's norm of x, or x itself for a norm that the family does not have (weight None)."""
    return x if weight is None else rms_norm(x, weight, architecture.norm_eps, architecture.traits.norm_offset)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Returns the root-mean-square norm (Zhang and Sennrich 2019) over the axes of `weight`; computed in float32.

    x: [..., *weight.shape]; the norm is scaled by offset + weight.
    """
    y = x.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + eps)
    return (y * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def attention_config(architecture: Architecture) -> AttentionConfig:
    """Returns scale, softcap and the windows of the architecture's attention kinds."""
    kinds, _ = architecture.attention_kinds
    return AttentionConfig(
        scale=(architecture.query_scalar or architecture.head_dim) ** -0.5,
        softcap=architecture.attention_softcap,
        windows=tuple(kind.window for kind in kinds),
    )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Returns radians per position [H / 2] (Su et al. 2021), stretched as `RopeScaling` says."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * jnp.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_rotation(positions: jax.Array, head_dim: int, kind: AttentionKind) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines [B, T, 1, H / 2] in float32. positions: [B, T]."""
    angles = positions[:, :, None, None] * rope_frequencies(head_dim, kind.rope_theta, kind.rope_scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns [B, T, heads, H] with RoPE: coordinates i and i + H / 2 are a pair, as in Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _select(choices: list[Any], index: jax.Array) -> Any:
    """Returns one of several trees of equal shapes. index: traced scalar, unused if there is only one choice."""
    if len(choices) == 1:
        return choices[0]
    return jax.tree.map(lambda *x: jax.lax.dynamic_index_in_dim(jnp.stack(x), index, keepdims=False), *choices)
