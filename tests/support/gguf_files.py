"""Writes Hugging Face directories as GGUF files, as llama.cpp's converter does."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor

from isheep_jax.gguf_model.architectures import ARCHITECTURES

_NAMES = {stored.class_name: name for name, stored in ARCHITECTURES.items()}
_INTEGERS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}


def write_gguf(
    directory: Path,
    path: Path,
    *,
    quantization: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    changed: dict[str, Any] | None = None,
) -> Path:
    """Writes a model's config.json and model.safetensors as a GGUF file.

    Args:
        directory: the model.
        path: the file.
        quantization: ggml type of the matrices whose rows its blocks divide; the others stay float32.
        tokenizer: values of the metadata by key, without "tokenizer."; see `byte_level_metadata`.
        changed: values of the metadata that differ from what follows from config.json, by key; None leaves one out.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    name = _NAMES[config["architectures"][0]]
    metadata = {f"{name}.{key}": config[field] for field, key in _INTEGERS.items() if config.get(field)}
    metadata |= {f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])} | _rope(name, config)
    if name == "llama":
        metadata["llama.rope.dimension_count"] = config["head_dim"]
    metadata |= {f"tokenizer.{key}": value for key, value in (tokenizer or {}).items()}
    metadata = {key: value for key, value in (metadata | (changed or {})).items() if value is not None}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", name))
    for key, value in metadata.items():
        _add(writer, key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    blocks = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config["num_hidden_layers"])
    for tensor, value in _tensors(directory, name, config).items():
        base, _, suffix = tensor.rpartition(".")
        divides = value.ndim == 2 and not value.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]
        stored = gguf.quantize(value, kind) if divides else value
        writer.add_tensor(f"{blocks.get_name(base)}.{suffix}", stored, raw_dtype=kind if divides else None)
    scaling = config["rope_parameters"]
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config, scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_metadata(directory: Path, pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """Returns the metadata of a byte-level tokenizer.json, without "tokenizer." before the keys."""
    stored = json.loads((directory / "tokenizer.json").read_text())
    added = {token["id"]: token for token in stored["added_tokens"]}
    tokens = {i: token for token, i in stored["model"]["vocab"].items()}
    tokens |= {i: token["content"] for i, token in added.items()}
    kinds = [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(tokens))]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    ids = {token: i for i, token in tokens.items()}
    values = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "ggml.token_type": kinds,
        "ggml.merges": [" ".join(merge) for merge in stored["model"]["merges"]],
    }
    for key in ("bos", "eos"):
        if token := config.get(f"{key}_token"):
            values[f"ggml.{key}_token_id"] = ids[token]
    return values | more


def sentencepiece_metadata(directory: Path) -> dict[str, Any]:
    """Returns the metadata of a tokenizer.model, without "tokenizer." before the keys."""
    model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = range(len(model))
    kinds = [6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1 for i in ids]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [model.id_to_piece(i) for i in ids],
        "ggml.scores": [float(model.get_score(i)) for i in ids],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": model.bos_id(),
        "ggml.eos_token_id": model.eos_id(),
        "ggml.unknown_token_id": model.unk_id(),
    }


def _rope(name: str, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    values = {f"{name}.rope.freq_base": float(full["rope_theta"])}
    if full["rope_type"] == "linear":
        values |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(full["factor"])}
    if "sliding_attention" in rope:
        values[f"{name}.rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        values[f"{name}.attention.sliding_window_pattern"] = [k == "sliding_attention" for k in config["layer_types"]]
    return values


def _llama3_divisors(config: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """Returns by how much each frequency is divided: Llama 3's formula, frequency by frequency."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for i in range(config["head_dim"] // 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (2 * i / config["head_dim"])
        turns = scaling["original_max_position_embeddings"] / wavelength
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(scaling["factor"])
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def _tensors(directory: Path, name: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors as float32, with what the converter does to their values done."""
    tensors = {key: value.astype(np.float32) for key, value in load_file(directory / "model.safetensors").items()}
    for key, value in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
        if name == "llama" and heads:
            halves = value.reshape(config[heads], 2, -1, *value.shape[1:])
            tensors[key] = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        if name == "gemma3" and key.endswith("norm.weight"):
            tensors[key] = value + 1
    return tensors


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)
