"""What a checkpoint's config.json says, and the one table of parameters that everything else is made from."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from isheep_jax.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE past the context of pre-training.

    kind "linear": every frequency divided by factor. kind "llama3": only wavelengths longer than original_context /
    low_freq_factor, with a smooth passage up to original_context / high_freq_factor (Llama 3.1 model card).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only transformer and the numbers that its mathematics needs."""

    family: Literal["llama", "qwen2"]
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
    qkv_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

# Fields that would change the mathematics if they were set, each with the one value that is implemented.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
}


def read_architecture(directory: Path) -> Architecture:
    """Reads config.json (and the end tokens of generation_config.json) of a Hugging Face model directory.

    Raises `UserError` naming the file and field when it is not a model directory, when the architecture is unknown, or
    when a field changes the mathematics in a way that is not implemented.
    """
    directory = Path(directory)
    path = directory / "config.json"
    fields = _read_json(path)
    names = fields.get("architectures") or "none"
    name = names[0] if isinstance(names, list) else names
    if name not in FAMILIES:
        raise UserError(f"{path}: architecture '{name}' is not known; known: {', '.join(sorted(FAMILIES))}")
    for field in _ONLY:
        _refuse_others(path, fields, field)
    if fields.get("quantization_config"):
        raise UserError(f"{path}: quantized weights (quantization_config) are not implemented; give the full ones")

    def integer(field: str, default: int | None = None) -> int:
        return int(_positive(path, fields, field, int, default))

    theta, scaling = _read_rope(path, fields)
    width, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads, head_dim = integer("num_key_value_heads", heads), integer("head_dim", width // heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim={head_dim} is odd, but RoPE turns pairs of coordinates")
    return Architecture(
        family=FAMILIES[name],
        vocab_size=integer("vocab_size"),
        hidden_size=width,
        intermediate_size=integer("intermediate_size"),
        layers=integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_positive(path, fields, "rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=integer("max_position_embeddings"),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=FAMILIES[name] == "qwen2",
        bos_token_id=next(iter(_token_ids(path, fields, "bos_token_id")), None),
        eos_token_ids=_end_tokens(path, fields),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise UserError(f"model directory {path.parent} does not exist; give a directory in Hugging Face format")
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _refuse_others(path: Path, fields: dict[str, Any], field: str) -> None:
    if fields.get(field) not in (_ONLY[field], None):
        raise UserError(f"{path}: {field}={fields[field]!r} is not implemented; only {_ONLY[field]!r} is")


def _positive(path: Path, fields: dict[str, Any], field: str, kind: type, default: float | None = None) -> float:
    value = default if fields.get(field) is None else fields[field]
    if value is None:
        raise UserError(f"{path}: the field {field} is missing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value <= 0 or (kind is int and value != int(value)):
        asked = "integer" if kind is int else "number"
        raise UserError(f"{path}: {field}={value!r} has the wrong type or sign; it is a positive {asked}")
    return kind(value)


def _read_rope(path: Path, fields: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, in both spellings: rope_theta + rope_scaling, or transformers 5's rope_parameters."""
    spelling = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    values = fields.get(spelling) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: {spelling}={values!r} is not an object")
    _refuse_others(path, values, "partial_rotary_factor")
    # The first Llamas' files do not name the base; 10000 is what both families then use.
    base = fields if values.get("rope_theta") is None else values
    theta = _positive(path, base, "rope_theta", float, 10_000.0)
    kind = values.get("rope_type", values.get("type", "default"))

    def number(field: str, kind_of_number: type = float) -> float:
        if values.get(field) is None:
            raise UserError(f"{path}: RoPE scaling '{kind}' lacks the field {field}")
        return _positive(path, values, field, kind_of_number)

    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        factors = [number(field) for field in ("factor", "low_freq_factor", "high_freq_factor")]
        return theta, RopeScaling("llama3", *factors, int(number("original_max_position_embeddings", int)))
    raise UserError(f"{path}: RoPE scaling '{kind}' is not implemented; known: default, linear, llama3")


def _token_ids(path: Path, fields: dict[str, Any], field: str) -> list[int]:
    value = fields.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{path}: {field}={value!r} has the wrong type; it is a token's id or a list of them")
    return ids


def _end_tokens(path: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    ids = _token_ids(path, fields, "eos_token_id")
    generation = path.with_name("generation_config.json")
    if generation.exists():
        ids = [*ids, *_token_ids(generation, _read_json(generation), "eos_token_id")]
    return tuple(dict.fromkeys(ids))


def huggingface_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The config.json of an export. dtype: name of the stored number format, such as "bfloat16"."""
    a = architecture
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.rope_scaling is not None:
        rope = {"rope_type": a.rope_scaling.kind, "factor": a.rope_scaling.factor}
        if a.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": a.rope_scaling.low_freq_factor,
                "high_freq_factor": a.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": a.rope_scaling.original_context,
            }
    fields = {
        "architectures": [next(name for name, family in FAMILIES.items() if family == a.family)],
        "model_type": a.family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        # Both spellings, so that transformers 4 and 5 read the same numbers.
        "rope_theta": a.rope_theta,
        "rope_scaling": rope if a.rope_scaling is not None else None,
        "rope_parameters": rope | {"rope_theta": a.rope_theta},
        "max_position_embeddings": a.context_length,
        "tie_word_embeddings": a.tied_embeddings,
        "bos_token_id": a.bos_token_id,
        "eos_token_id": list(a.eos_token_ids),
        "torch_dtype": dtype,
    }
    if a.family == "llama":
        fields |= {"attention_bias": False, "mlp_bias": False}
    return fields


@dataclass(frozen=True)
class ParameterSpec:
    """One leaf of the parameter tree.

    shape and axes: of the leaf as it is computed with; a leaf of the layers has a leading "layers" axis.
    hf_name: the Hugging Face tensor; "{layer}" stands for the layer's number.
    hf_shape: shape of that tensor (of one layer). transposed: the stored matrix is [outputs, inputs], ours has the
    inputs first, so the tensor is transposed before it is reshaped to `shape`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["normal", "ones", "zeros"]
    hf_name: str
    hf_shape: tuple[int, ...]
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def parameter_table(architecture: Architecture) -> dict[str, Any]:
    """A `ParameterSpec` for each leaf, in the parameters' own tree.

    Logical axes: layers, vocab, embed (model width), heads, kv_heads, head_dim, ffn.
    """
    a = architecture
    L, D, N, K, H, F, V = a.layers, a.hidden_size, a.heads, a.kv_heads, a.head_dim, a.intermediate_size, a.vocab_size

    def matrix(inputs: dict[str, int], outputs: dict[str, int], name: str) -> ParameterSpec:
        return ParameterSpec(
            (L, *inputs.values(), *outputs.values()),
            ("layers", *inputs, *outputs),
            "normal",
            f"model.layers.{{layer}}.{name}.weight",
            (math.prod(outputs.values()), math.prod(inputs.values())),
            transposed=True,
        )

    def bias(sides: dict[str, int], name: str) -> ParameterSpec:
        hf_name = f"model.layers.{{layer}}.{name}.bias"
        return ParameterSpec((L, *sides.values()), ("layers", *sides), "zeros", hf_name, (math.prod(sides.values()),))

    def norm(name: str) -> ParameterSpec:
        return ParameterSpec((L, D), ("layers", "embed"), "ones", f"model.layers.{{layer}}.{name}.weight", (D,))

    embed, ffn = {"embed": D}, {"ffn": F}
    query, key = {"heads": N, "head_dim": H}, {"kv_heads": K, "head_dim": H}
    layers = {
        "attn_norm": norm("input_layernorm"),
        "wq": matrix(embed, query, "self_attn.q_proj"),
        "wk": matrix(embed, key, "self_attn.k_proj"),
        "wv": matrix(embed, key, "self_attn.v_proj"),
        "wo": matrix(query, embed, "self_attn.o_proj"),
        "mlp_norm": norm("post_attention_layernorm"),
        "w_gate": matrix(embed, ffn, "mlp.gate_proj"),
        "w_up": matrix(embed, ffn, "mlp.up_proj"),
        "w_down": matrix(ffn, embed, "mlp.down_proj"),
    }
    if a.qkv_bias:
        layers |= {
            "bq": bias(query, "self_attn.q_proj"),
            "bk": bias(key, "self_attn.k_proj"),
            "bv": bias(key, "self_attn.v_proj"),
        }
    table = {
        "embed": ParameterSpec((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight", (V, D)),
        "layers": layers,
        "final_norm": ParameterSpec((D,), ("embed",), "ones", "model.norm.weight", (D,)),
    }
    if not a.tied_embeddings:
        table["lm_head"] = ParameterSpec((D, V), ("embed", "vocab"), "normal", "lm_head.weight", (V, D), True)
    return table


def leaves(architecture: Architecture) -> Iterator[tuple[tuple[str, ...], ParameterSpec]]:
    """Every leaf of the table with its path: ("layers", "wq"), ..."""
    for path, spec in jax.tree_util.tree_flatten_with_path(parameter_table(architecture))[0]:
        yield tuple(key.key for key in path), spec


def init_parameters(architecture: Architecture, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict[str, Any]:
    """Random weights: matrices normal with standard deviation 0.02, norms one, biases zero."""
    table = parameter_table(architecture)
    specs, tree = jax.tree.flatten(table)
    keys = jax.random.split(key, len(specs))

    def draw(spec: ParameterSpec, key: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return (0.02 * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)
        return jnp.full(spec.shape, 1 if spec.init == "ones" else 0, dtype)

    return jax.tree.unflatten(tree, [draw(spec, k) for spec, k in zip(specs, keys)])


def parameter_count(architecture: Architecture) -> int:
    return sum(math.prod(spec.shape) for _, spec in leaves(architecture))
