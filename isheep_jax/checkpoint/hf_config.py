"""Reads config.json of a model into an `Architecture`, and writes it from one."""

import math
from typing import Any

from etils import epath

from isheep_jax.errors import UserError, quoted
from isheep_jax.model.architecture import FAMILIES, Architecture, Family, RopeScaling
from isheep_jax.text.eos import configured_eos_ids
from isheep_jax.text.json_files import has_file, read_json_object

# Fields that change the mathematics, each with the one value that is implemented.
_ONLY = {
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
    # Of other families, and of code that comes with a model, some of which call themselves by a class that is known.
    "add_bias_linear": False,
    "add_cross_attention": False,
    "alibi": False,
    "attention_multiplier": None,
    "clip_qkv": None,
    "embedding_multiplier": 1.0,
    "is_encoder_decoder": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "mup_width_multiplier": 1.0,
    "n_routed_experts": 0,
    "no_rope_layers": None,
    "num_experts": 0,
    "num_local_experts": 0,
    "parallel_attn": False,
    "residual_multiplier": 1.0,
    "rope_interleave": False,
    "rope_interleaved": False,
    "rotary_pct": 1.0,
    "scale_depth": 1.0,
    "scale_emb": 1.0,
    "use_alibi": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
}
# Fields of quantized weights: of Hugging Face, of an older llm-compressor and of MLX.
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
# Larger numbers, and reals further from one, belong to no model: arrays of them are not worth the wait for memory.
_MOST_LAYERS, _MOST, _LARGEST = 2**14, 2**31, 1e30
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_architecture(directory: epath.PathLike) -> Architecture:
    """Reads config.json (and the eos ids of generation_config.json) of a Hugging Face directory, or of a GGUF file.

    Raises `UserError` naming the file and field when it is not a model directory, when the architecture is unknown, or
    when a field changes the mathematics in a way that is not implemented.
    """
    fields = _read_fields(epath.Path(directory) / "config.json")
    path = fields.path
    family = _family(fields)
    traits = FAMILIES[family]
    for name, value in _ONLY.items():
        fields.require(name, value)
    if not traits.qkv_bias:
        fields.require("attention_bias", False)
    fields.require(traits.activation_field, traits.activation)
    for name in _QUANTIZED:
        if fields[name]:
            raise UserError(f"{path}: quantized weights ({name}) are not implemented; give the full ones")

    width, heads = fields.number("hidden_size", int), fields.number("num_attention_heads", int)
    layers = fields.number("num_hidden_layers", int)
    if layers > _MOST_LAYERS:
        raise UserError(f"{path}: num_hidden_layers={layers} is more than any model has; {_MOST_LAYERS} are read")
    kv_heads = fields.number("num_key_value_heads", int, heads)
    head_dim = fields.number("head_dim", int, traits.head_dim or width / heads)
    if heads % kv_heads:
        raise UserError(f"{path}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim={head_dim} is odd, but RoPE turns pairs of coordinates")
    window, windowed_layers = _windows(fields, traits, layers)
    theta, scaling, window_theta = _read_rope(fields, traits)
    scaling_and_caps = {}
    if traits.query_scalar is not None:
        scaling_and_caps = {
            "query_scalar": fields.number("query_pre_attn_scalar", int, traits.query_scalar),
            "attention_softcap": fields.optional("attn_logit_softcapping", float, traits.attention_softcap),
            "logit_softcap": fields.optional("final_logit_softcapping", float, traits.logit_softcap),
        }
    context_length = fields.number("max_position_embeddings", int)
    if context_length < 2:
        raise UserError(f"{path}: max_position_embeddings={context_length} leaves no room for an answer; at least 2")
    return Architecture(
        family=family,
        vocab_size=fields.number("vocab_size", int),
        hidden_size=width,
        intermediate_size=fields.number("intermediate_size", int),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=context_length,
        tied_embeddings=fields.flag("tie_word_embeddings", traits.tied_embeddings),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=configured_eos_ids(path.parent),
        window=window,
        windowed_layers=windowed_layers,
        window_rope_theta=window_theta,
        **scaling_and_caps,
    )


class _Fields:
    """The fields of config.json. path: named in error messages."""

    def __init__(self, path: epath.Path, values: dict[str, Any]):
        self.path = path
        self.values = values

    def __getitem__(self, name: str) -> Any:
        """Returns the value of a field; None if it is missing or null."""
        return self.values.get(name)

    def shown(self, name: str, value: Any) -> str:
        """Returns how an error begins that is about the value of a field."""
        return f"{self.path}: {name}={quoted(repr(value))}"

    def not_implemented(self, name: str, instead: str) -> UserError:
        """Returns the error for a value that is not implemented. instead: what is."""
        return UserError(f"{self.shown(name, self[name])} is not implemented; only {instead} is")

    def require(self, name: str, value: Any) -> None:
        """Raises `UserError` when the field has another value than this one or none."""
        if self[name] not in (value, None):
            raise self.not_implemented(name, repr(value))

    def number(self, name: str, kind: type = float, default: float | None = None) -> Any:
        """Returns a field as a positive number of type `kind`; the default if it is missing or null."""
        value = default if self[name] is None else self[name]
        if value is None:
            raise UserError(f"{self.path}: the field {name} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf or (kind is int and value != int(value)):
            expected = "integer" if kind is int else "number"
            raise UserError(f"{self.shown(name, value)} has the wrong type or sign; it is a positive {expected}")
        if value >= (_MOST if kind is int else _LARGEST) or value <= 1 / _LARGEST:
            raise UserError(f"{self.shown(name, value)} is a number that no model has")
        return kind(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false; the default if it is missing or null."""
        value = default if self[name] is None else self[name]
        if not isinstance(value, bool):
            raise UserError(f"{self.shown(name, value)} has the wrong type; it is true or false")
        return value

    def optional(self, name: str, kind: type = float, default: float | None = None) -> Any:
        """Returns a positive number, None for null, or the default if the field is missing."""
        return default if name not in self.values else None if self[name] is None else self.number(name, kind)

    def token_ids(self, name: str) -> list[int]:
        """Returns the ids in a field that holds one id, a list of them or none."""
        value = self[name]
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{self.shown(name, value)} has the wrong type; it is a token's id or a list of them")
        return [i for i in ids if i >= 0]  # some files say -1 for none


def _read_fields(path: epath.Path) -> _Fields:
    if not path.parent.exists():
        raise UserError(f"model directory {path.parent} does not exist; give a directory in Hugging Face format")
    if not has_file(path):
        raise UserError(f"{path.parent} is not a model directory: it has no {path.name}")
    return _Fields(path, read_json_object(path))


def _family(fields: _Fields) -> str:
    """Returns the key of `FAMILIES`: by the class in architectures or, where that is missing, by model_type.

    The class decides because other models, such as classifiers, share the model_type of a language model; a model_type
    of another family beside it is an error, since other libraries go by that.
    """
    classes, model_type = fields["architectures"], fields["model_type"]
    class_name = classes[0] if classes and isinstance(classes, list) else classes
    for family, traits in FAMILIES.items():
        if class_name == traits.class_name and model_type not in (family, None, ""):
            raise UserError(
                f"{fields.shown('model_type', model_type)} is not that of {class_name} (architectures), {family!r}"
            )
        if class_name == traits.class_name or (not class_name and model_type == family):
            return family
    if class_name:
        problem = f"architectures={quoted(repr(classes))} is not supported"
    elif model_type:
        problem = f"model_type={quoted(repr(model_type))} is not supported"
    else:
        problem = "architectures and model_type are missing, one of which must name the kind of model"
    supported = ", ".join(f"{traits.class_name} ({family})" for family, traits in FAMILIES.items())
    raise UserError(f"{fields.path}: {problem}; supported: {supported}")


def _windows(fields: _Fields, traits: Family, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Returns the attention window (tokens) and the layers that have it."""
    kinds = fields["layer_types"]
    if kinds is not None and (
        not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (_SLIDING, _FULL) for kind in kinds)
    ):
        raise fields.not_implemented("layer_types", f"a list of {layers} names, '{_FULL}' or '{_SLIDING}',")
    if traits.windows == "none":
        if _SLIDING in (kinds or ()):
            raise fields.not_implemented("layer_types", f"'{_FULL}'")
        return None, ()
    if traits.windows == "upper" and not fields.flag("use_sliding_window", False):
        return None, ()
    window = fields.optional("sliding_window", int, 4096)
    if window is None:
        return None, ()
    if kinds is not None:
        chosen = [i for i, kind in enumerate(kinds) if kind == _SLIDING]
        if traits.windows == "all" and len(chosen) != layers:
            raise fields.not_implemented("layer_types", f"'{_SLIDING}' with sliding_window={window}")
    elif traits.windows == "upper":
        chosen = range(fields.number("max_window_layers", int, 28), layers)
    elif traits.windows == "pattern":
        pattern = fields.number("sliding_window_pattern", int, traits.pattern)
        chosen = [i for i in range(layers) if (i + 1) % pattern]
    else:
        chosen = range(layers)
    return (window, tuple(chosen)) if chosen else (None, ())


def _read_rope(fields: _Fields, traits: Family) -> tuple[float, RopeScaling | None, float | None]:
    """Returns RoPE's base and scaling, and the base of windowed layers if it is another one.

    There are two spellings: rope_theta + rope_scaling (and Gemma 3's rope_local_base_freq), or rope_parameters of
    transformers 5, which Gemma 3 has by kind of layer. Where a file has both, as exports do, they say the same.
    """
    found = [_rope_of_spelling(fields, traits, name) for name in ("rope_parameters", "rope_scaling") if fields[name]]
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(f"{fields.path}: rope_parameters and rope_scaling say different things; remove the wrong one")
    return found[0] if found else _rope_of_spelling(fields, traits, "rope_scaling")


def _rope_of_spelling(fields: _Fields, traits: Family, spelling: str) -> tuple[float, RopeScaling | None, float | None]:
    values = fields[spelling] or {}
    if not isinstance(values, dict):
        raise UserError(f"{fields.shown(spelling, values)} is not an object")
    theta, window_theta = traits.rope_theta, traits.window_rope_theta
    nested = {kind: values[kind] or {} for kind in (_FULL, _SLIDING) if kind in values}
    if (nested and window_theta is None) or not all(isinstance(value, dict) for value in nested.values()):
        raise fields.not_implemented(spelling, "one set of numbers")
    if nested:
        local, local_scaling = _rope(fields, nested.get(_SLIDING, {}), window_theta, nested=True)
        if local_scaling is not None:
            raise fields.not_implemented(spelling, f"rope_type 'default' for '{_SLIDING}'")
        return *_rope(fields, nested.get(_FULL, {}), theta, nested=True), local
    if window_theta is not None:
        window_theta = fields.number("rope_local_base_freq", float, window_theta)
    return *_rope(fields, values, theta), window_theta


def _rope(
    fields: _Fields, values: dict[str, Any], default_theta: float, nested: bool = False
) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of one set of RoPE parameters.

    Args:
        fields: all fields of config.json; one of them is the base if the set has none.
        values: the set.
        default_theta: the base if neither has one.
        nested: the set is that of one kind of layer, for which `fields` have no base.
    """
    inner = _Fields(fields.path, values)
    inner.require("partial_rotary_factor", 1.0)
    holder = fields if inner["rope_theta"] is None and not nested else inner
    theta = holder.number("rope_theta", float, default_theta)
    if not nested and fields["rope_theta"] is not None and fields.number("rope_theta") != theta:
        raise UserError(
            f"{fields.shown('rope_theta', fields['rope_theta'])}, but rope_parameters has {theta:g}; remove the wrong "
            "one"
        )
    kind = inner["rope_type"] or inner["type"] or "default"

    def number(name: str, number_type: type = float) -> Any:
        if inner[name] is None:
            raise UserError(f"{fields.path}: RoPE scaling '{kind}' lacks the field {name}")
        return inner.number(name, number_type)

    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        factor, low, high = (number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise UserError(f"{inner.shown('low_freq_factor', low)} must be less than high_freq_factor={high:g}")
        return theta, RopeScaling("llama3", factor, low, high, number("original_max_position_embeddings", int))
    raise UserError(
        f"{fields.path}: RoPE scaling {quoted(repr(kind))} is not implemented; known: default, linear, llama3"
    )


def config_json(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Returns the config.json of an export. dtype: name of the stored dtype, such as "bfloat16"."""
    a, traits = architecture, architecture.traits
    fields = {
        "architectures": [traits.class_name],
        "model_type": a.family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": traits.activation,
        "rms_norm_eps": a.norm_eps,
        **_rope_fields(a),
        "max_position_embeddings": a.context_length,
        "tie_word_embeddings": a.tied_embeddings,
        "bos_token_id": a.bos_token_id,
        "eos_token_id": list(a.eos_token_ids),
        "torch_dtype": dtype,
    }
    if not traits.qkv_bias:
        fields["attention_bias"] = False
    fields |= traits.exports
    if traits.windows != "none":
        fields["sliding_window"] = a.window
    if traits.windows in ("upper", "pattern"):
        fields["layer_types"] = [_SLIDING if i in a.windowed_layers else _FULL for i in range(a.layers)]
    if traits.windows == "upper":
        fields |= {
            "use_sliding_window": a.window is not None,
            "max_window_layers": min(a.windowed_layers, default=a.layers),
        }
    if traits.query_scalar is not None:
        fields |= {
            traits.activation_field: traits.activation,
            "query_pre_attn_scalar": a.query_scalar,
            "attn_logit_softcapping": a.attention_softcap,
            "final_logit_softcapping": a.logit_softcap,
        }
    return fields


def _rope_fields(a: Architecture) -> dict[str, Any]:
    """Returns RoPE in both spellings, so that transformers 4 and 5 read the same numbers."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if a.rope_scaling is not None:
        rope = {"rope_type": a.rope_scaling.kind, "factor": a.rope_scaling.factor}
        if a.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": a.rope_scaling.low_freq_factor,
                "high_freq_factor": a.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": a.rope_scaling.original_context,
            }
    fields: dict[str, Any] = {"rope_theta": a.rope_theta, "rope_scaling": rope if a.rope_scaling is not None else None}
    rope = rope | {"rope_theta": a.rope_theta}
    if a.window_rope_theta is None:
        return fields | {"rope_parameters": rope}
    local = {"rope_type": "default", "rope_theta": a.window_rope_theta}
    return fields | {
        "rope_local_base_freq": a.window_rope_theta,
        "rope_parameters": {_FULL: rope, _SLIDING: local},
    }
