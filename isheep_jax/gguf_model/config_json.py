"""Translates the metadata of a GGUF file into the fields of a Hugging Face config.json."""

import math
from typing import Any

import numpy as np

from isheep_jax.errors import UserError, quoted
from isheep_jax.gguf_model.architectures import architecture_of
from isheep_jax.gguf_model.header import Header
from isheep_jax.gguf_model.tensors import stored_tensor

# Fields by the key of the metadata, without the architecture's name before it.
_NEEDED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Keys that change the mathematics, each with the values that are implemented; 0 is "off" to llama.cpp.
_ONLY = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "embedding_scale": (1, 0),
    "expert_count": (0,),
    "logit_scale": (1, 0),
    "residual_scale": (1, 0),
    "rope.scale_linear": (1, 0),
    "rope.scaling.attn_factor": (1, 0),
    "use_parallel_residual": (False,),
}
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Llama 3's own; a file has only the frequencies that follow from them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR = 1.0, 4.0
# Gemma 3 27B divides its attention logits by another number than the square root of the head size, which llama.cpp
# knows by the number of layers.
_LAYERS_OF_GEMMA3_27B = 62


def config_json(header: Header) -> dict[str, Any]:
    """Returns the fields of config.json, for `read_architecture`, which checks them.

    Raises `UserError`, naming the file, for an unknown architecture, a missing key or a RoPE that is not implemented.
    """
    name, stored = architecture_of(header)
    metadata = header.metadata
    fields = {field: header.need(f"{name}.{key}") for key, field in _NEEDED.items()}
    fields |= {field: metadata[f"{name}.{key}"] for key, field in _OPTIONAL.items() if f"{name}.{key}" in metadata}
    for key, known in _ONLY.items():
        if metadata.get(f"{name}.{key}", known[0]) not in known:
            shown = quoted(str(metadata[f"{name}.{key}"]))
            raise UserError(f"{header.path}: {name}.{key}={shown} is not implemented; only {known[0]} is")
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{header.path}: tensor token_embd.weight is missing")
    eos = [metadata[f"tokenizer.ggml.{key}"] for key in _EOS if f"tokenizer.ggml.{key}" in metadata]
    fields |= {
        "architectures": [stored.class_name],
        # The embeddings may have more rows than there are tokens.
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(eos)),
    }
    head_dim = fields.get("head_dim") or fields["hidden_size"] / fields["num_attention_heads"]
    turned = metadata.get(f"{name}.rope.dimension_count", head_dim)
    if turned != head_dim:
        fields["partial_rotary_factor"] = turned / head_dim
    if (size := metadata.get(f"{name}.attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{header.path}: values of {size} numbers for keys of {head_dim:g} are not implemented")
    if (scaling := _rope_scaling(header, name, fields, head_dim)) is not None:
        fields["rope_scaling"] = scaling
    return fields | (_gemma3_fields(header, fields, head_dim) if name == "gemma3" else {})


def _gemma3_fields(header: Header, fields: dict[str, Any], head_dim: float) -> dict[str, Any]:
    pattern = header.metadata.get("gemma3.attention.sliding_window_pattern")
    scalar = head_dim
    if fields["num_hidden_layers"] == _LAYERS_OF_GEMMA3_27B:
        scalar = fields["hidden_size"] // fields["num_attention_heads"]
    more: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    of_layers = isinstance(pattern, list) and all(type(windowed) in (bool, int) for windowed in pattern)
    if not of_layers and pattern is not None and type(pattern) is not int:
        raise UserError(
            f"{header.path}: gemma3.attention.sliding_window_pattern={quoted(str(pattern))} is not a pattern"
        )
    if of_layers:  # does it have a window?
        more["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    elif pattern is not None:
        more["sliding_window_pattern"] = pattern
    return more


def _rope_scaling(header: Header, name: str, fields: dict[str, Any], head_dim: float) -> dict[str, Any] | None:
    factor = header.metadata.get(f"{name}.rope.scaling.factor")
    # llama.cpp scales by a factor without a type, too.
    kind = header.metadata.get(f"{name}.rope.scaling.type", "linear" if factor not in (None, 0, 1) else "none")
    if kind != "none":
        return {"rope_type": kind, "factor": factor}
    if _ROPE_FREQUENCIES not in header.tensors:
        return None
    return _llama3_scaling(header, fields.get("rope_theta", 10_000.0), int(head_dim))


def _llama3_scaling(header: Header, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Returns the settings of Llama 3's scaling that give the frequency divisors of the file; None if all are one.

    Raises `UserError` when no settings do.
    """
    tensor = stored_tensor(header, _ROPE_FREQUENCIES)
    divisors = np.empty(tensor.shape, np.float32)
    tensor.read_rows(0, len(divisors), divisors)
    others = UserError(f"{header.path}: the RoPE frequencies of {_ROPE_FREQUENCIES} are not those of Llama 3's scaling")
    if divisors.shape != (head_dim // 2,) or not np.all(np.isfinite(divisors) & (divisors >= 1)) or theta <= 1:
        raise others
    factor = float(divisors.max())
    if factor == 1:
        return None
    wavelengths = 2 * math.pi * theta ** (2 * np.arange(len(divisors)) / head_dim)
    low, high = _LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR
    between = (divisors > 1) & (divisors < factor)
    smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    originals = wavelengths[between] * (smooth[between] * (high - low) + low)
    original = round(float(np.median(originals))) if between.any() else 8192
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(1 / divisors, (1 - smooth) / factor + smooth, rtol=1e-4):
        raise others
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
