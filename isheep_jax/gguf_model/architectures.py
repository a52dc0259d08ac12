"""The architectures that are read from GGUF files, with how llama.cpp stores each."""

from dataclasses import dataclass, field

from isheep_jax.errors import UserError
from isheep_jax.gguf_model.header import Header

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Stored:
    """How a kind of model is stored: a row of `ARCHITECTURES`.

    class_name: the Hugging Face class.
    layer: Hugging Face names of a layer's tensors by their names in the file, without ".weight" and ".bias".
    permuted: the rows of queries and keys are in the order of the original Llama, whose RoPE turns neighboring
        coordinates of a head together; in Hugging Face's order they lie half a head apart.
    norm_offset: what the file adds to the norm weights that Hugging Face stores.
    """

    class_name: str
    layer: dict[str, str] = field(default_factory=lambda: _LAYER)
    permuted: bool = False
    norm_offset: float = 0.0


# Keyed by general.architecture.
ARCHITECTURES = {
    "llama": Stored("LlamaForCausalLM", permuted=True),
    "qwen2": Stored("Qwen2ForCausalLM"),
    "qwen3": Stored("Qwen3ForCausalLM"),
    "gemma3": Stored(
        "Gemma3ForCausalLM",
        layer=_LAYER
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}


def architecture_of(header: Header) -> tuple[str, Stored]:
    """Returns the name of a file's architecture and its row. Raises `UserError` when it is none of `ARCHITECTURES`."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        what = "a LoRA adapter" if kind == "adapter" else f"a file of the type {kind!r} (general.type)"
        raise UserError(f"{header.path} is {what}, not a model")
    name = header.need("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{header.path}: the architecture {name!r} is not read from GGUF; {', '.join(ARCHITECTURES)} are"
        )
    if header.metadata.get("split.count", 1) > 1:
        raise UserError(f"{header.path} is one part of several; join them with llama-gguf-split --merge")
    return name, ARCHITECTURES[name]
