"""Describes a model: its sizes, its family (`FAMILIES`), and the one table of its parameters.

Init, shardings, import, export and LoRA are all made from `parameter_table`; a new family is a new row of `FAMILIES`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Family:
    """Traits of the models of one model_type, apart from their sizes: a row of `FAMILIES`.

    class_name: the Hugging Face class, as in the field architectures of config.json.
    norms: Hugging Face names of the norms before and after attention and feed-forward, by leaf. A leaf that is missing
        is a norm that the family does not have.
    qk_norm: a norm of each query and key "head", or of the whole "projection".
    norm_offset: added to a stored norm weight.
    activation_field: field of config.json that names the activation.
    windows: layers with a sliding window: "none", "all", "upper" (from max_window_layers on, if use_sliding_window is
        set), or "pattern" (all but every `pattern`-th).
    tied_embeddings, head_dim, pattern, rope_theta: values if config.json has none (head_dim None: hidden_size / heads).
    window_rope_theta: the same for the RoPE base of layers with a window; None: they share that of the others.
    query_scalar, attention_softcap, logit_softcap: the same for query_pre_attn_scalar, attn_logit_softcapping and
        final_logit_softcapping; query_scalar None: the family has none of the three fields.
    exports: fields of an exported config.json that only this family has.
    """

    class_name: str
    norms: dict[str, str] = field(
        default_factory=lambda: {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    activation_field: str = "hidden_act"
    scaled_embeddings: bool = False
    windows: Literal["none", "all", "upper", "pattern"] = "none"
    tied_embeddings: bool = False
    head_dim: int | None = None
    pattern: int = 0
    rope_theta: float = 10_000.0
    window_rope_theta: float | None = None
    query_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    exports: dict[str, Any] = field(default_factory=dict)


_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA = {
    "norms": _FOUR_NORMS,
    "norm_offset": 1.0,
    "activation": "gelu_pytorch_tanh",
    "activation_field": "hidden_activation",
    "scaled_embeddings": True,
    "windows": "pattern",
    "tied_embeddings": True,
    "head_dim": 256,
    "query_scalar": 256,
}

# Keyed by the model_type of config.json.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", exports={"mlp_bias": False}),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, windows="upper"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head", windows="upper", head_dim=128),
    "mistral": Family("MistralForCausalLM", windows="all"),
    "gemma2": Family("Gemma2ForCausalLM", **_GEMMA, pattern=2, attention_softcap=50.0, logit_softcap=30.0),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **_GEMMA,
        qk_norm="head",
        pattern=6,
        rope_theta=1_000_000.0,
        window_rope_theta=10_000.0,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        norms={"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
        qk_norm="projection",
    ),
}


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE past the context of pre-training.

    kind "linear": every frequency divided by factor. kind "llama3": only wavelengths longer than original_context /
    low_freq_factor, with a smooth transition from original_context / high_freq_factor (Llama 3.1 model card).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class AttentionKind:
    """Attention of one kind of layer."""

    window: int | None  # tokens that a token sees, itself included; None: all before it
    rope_theta: float
    rope_scaling: RopeScaling | None


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only transformer and the numbers that its mathematics needs.

    family: a key of `FAMILIES`.
    windowed_layers: layers (from 0) that see only `window` tokens, and whose RoPE has the base window_rope_theta (None:
        the same RoPE as the others).
    query_scalar: attention logits are divided by its square root (None: by that of head_dim).
    attention_softcap, logit_softcap: bounds c of attention logits and logits, as c tanh(x / c); None: unbounded.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    context_length: int
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    window_rope_theta: float | None = None
    query_scalar: int | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def traits(self) -> Family:
        """The family's row of `FAMILIES`."""
        return FAMILIES[self.family]

    @property
    def attention_kinds(self) -> tuple[tuple[AttentionKind, ...], tuple[int, ...]]:
        """The kinds of attention that occur, and for each layer the index of its kind."""
        full = AttentionKind(None, self.rope_theta, self.rope_scaling)
        windowed = AttentionKind(self.window, self.rope_theta, self.rope_scaling)
        if self.window_rope_theta is not None:
            windowed = AttentionKind(self.window, self.window_rope_theta, None)
        layers = [windowed if layer in self.windowed_layers else full for layer in range(self.layers)]
        kinds = tuple(dict.fromkeys(layers))
        return kinds, tuple(map(kinds.index, layers))


@dataclass(frozen=True)
class ParameterSpec:
    """One leaf of the parameter tree.

    shape, axes: sizes and logical axes of the leaf; a leaf of the layers has a leading "layers" axis.
    hf_name: the Hugging Face tensor; "{layer}" stands for the layer's number.
    hf_shape: shape of that tensor (of one layer).
    transposed: the stored matrix is [outputs, inputs] and the leaf has the inputs first, so the tensor is transposed
        before it is reshaped to `shape`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"]
    hf_name: str
    hf_shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """True where the leaf holds all layers."""
        return self.axes[0] == "layers"

    @property
    def is_matrix(self) -> bool:
        """True where the Hugging Face tensor is a matrix, which weight decay and int8 are for."""
        return len(self.hf_shape) == 2

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of a matrix leaf that a product with it sums over."""
        if not self.transposed:
            return (len(self.shape) - 1,)
        first = int(self.stacked)
        sizes = (math.prod(self.shape[first:end]) for end in range(first + 1, len(self.shape)))
        return tuple(range(first, first + 1 + list(sizes).index(self.hf_shape[1])))


def parameter_table(architecture: Architecture) -> dict[str, Any]:
    """Returns a `ParameterSpec` for each leaf, in the tree of the parameters.

    Logical axes: layers, vocab, embed (model width), heads, kv_heads, head_dim, ffn.
    """
    a, traits = architecture, architecture.traits
    L, D, N, K, H, F, V = a.layers, a.hidden_size, a.heads, a.kv_heads, a.head_dim, a.intermediate_size, a.vocab_size
    unit = "zeros" if traits.norm_offset else "ones"  # a norm that only normalizes

    # Sizes are given by logical axis.
    def matrix(inputs: dict[str, int], outputs: dict[str, int], name: str) -> ParameterSpec:
        return ParameterSpec(
            (L, *inputs.values(), *outputs.values()),
            ("layers", *inputs, *outputs),
            "normal",
            f"model.layers.{{layer}}.{name}.weight",
            (math.prod(outputs.values()), math.prod(inputs.values())),
            transposed=True,
        )

    def vector(sizes: dict[str, int], init: Literal["ones", "zeros"], name: str) -> ParameterSpec:
        hf_name = f"model.layers.{{layer}}.{name}"
        return ParameterSpec((L, *sizes.values()), ("layers", *sizes), init, hf_name, (math.prod(sizes.values()),))

    embed, ffn = {"embed": D}, {"ffn": F}
    query, key = {"heads": N, "head_dim": H}, {"kv_heads": K, "head_dim": H}
    layers = {
        "wq": matrix(embed, query, "self_attn.q_proj"),
        "wk": matrix(embed, key, "self_attn.k_proj"),
        "wv": matrix(embed, key, "self_attn.v_proj"),
        "wo": matrix(query, embed, "self_attn.o_proj"),
        "w_gate": matrix(embed, ffn, "mlp.gate_proj"),
        "w_up": matrix(embed, ffn, "mlp.up_proj"),
        "w_down": matrix(ffn, embed, "mlp.down_proj"),
        **{leaf: vector(embed, unit, f"{name}.weight") for leaf, name in traits.norms.items()},
    }
    if traits.qkv_bias:
        biases = {"bq": (query, "q_proj"), "bk": (key, "k_proj"), "bv": (key, "v_proj")}
        layers |= {leaf: vector(sizes, "zeros", f"self_attn.{name}.bias") for leaf, (sizes, name) in biases.items()}
    if traits.qk_norm != "none":
        head = {"head_dim": H}
        for leaf, projection in (("q_norm", query), ("k_norm", key)):
            sizes = head if traits.qk_norm == "head" else projection
            layers[leaf] = vector(sizes, unit, f"self_attn.{leaf}.weight")
    table = {
        "embed": ParameterSpec((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight", (V, D)),
        "layers": layers,
        "final_norm": ParameterSpec((D,), ("embed",), unit, "model.norm.weight", (D,)),
    }
    if not a.tied_embeddings:
        table["lm_head"] = ParameterSpec((D, V), ("embed", "vocab"), "normal", "lm_head.weight", (V, D), True)
    return table


def leaves(table: Any) -> Iterator[tuple[tuple[str, ...], ParameterSpec]]:
    """Yields every leaf of a table with its path: ("layers", "wq"), ..."""
    for path, spec in jax.tree_util.tree_flatten_with_path(table)[0]:
        yield tuple(key.key for key in path), spec


def init_parameters(architecture: Architecture, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict[str, Any]:
    """Returns random weights: matrices normal with standard deviation 0.02, norms that only normalize, biases zero."""
    specs, tree = jax.tree.flatten(parameter_table(architecture))
    keys = jax.random.split(key, len(specs))

    def init(spec: ParameterSpec, key: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return (0.02 * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)
        return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)

    return jax.tree.unflatten(tree, [init(spec, k) for spec, k in zip(specs, keys)])


def parameter_count(architecture: Architecture) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(spec.shape) for _, spec in leaves(parameter_table(architecture)))
