"""Writes tests/model/fixtures from Hugging Face's PyTorch models: `python tests/support/make_fixtures.py`; needs torch.

Each fixture is a random model as transformers saves it (config.json, model.safetensors) and expected.safetensors:
tokens, labels (-100: no loss), logits, the tokens that greedy decoding appends to the first tokens, the mean loss and
its gradient for every tensor, all in float32.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

FIXTURES = Path(__file__).parents[1] / "model" / "fixtures"

# Greedy decoding goes on from so many tokens, for so many.
PROMPT, NEW = 6, 10

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Not hidden_size / heads, so that confusing the two is noticed.
HEADS = {"head_dim": 8}
DEEPER = {"num_hidden_layers": 3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Name: (config, tokens per row). The scaled ones are read far past the 32 positions of their original context, with a
# small theta so that the frequencies fall on both sides of the passage between stretched and not. Windows are shorter
# than the rows, and a deeper model has layers with and without one.
CASES: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama": (LlamaConfig(**SHAPE, **HEADS, rms_norm_eps=1e-5, tie_word_embeddings=True), 24),
    "llama_scaled_rope": (
        LlamaConfig(**SHAPE | {"head_dim": 16}, rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE),
        96,
    ),
    "llama_linear_rope": (
        LlamaConfig(
            **SHAPE, rms_norm_eps=1e-5, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
        ),
        48,
    ),
    "qwen2": (
        Qwen2Config(**SHAPE, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        24,
    ),
    "qwen2_window": (
        Qwen2Config(
            **SHAPE,
            rms_norm_eps=1e-6,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        24,
    ),
    "qwen3": (Qwen3Config(**SHAPE, **HEADS, rms_norm_eps=1e-6), 24),
    "mistral": (MistralConfig(**SHAPE, **HEADS, rms_norm_eps=1e-5, sliding_window=7), 24),
    # Small softcaps, so that scores and logits reach into the bend of the tanh.
    "gemma2": (
        Gemma2Config(
            **SHAPE | DEEPER,
            **HEADS,
            query_pre_attn_scalar=12,
            sliding_window=7,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        24,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SHAPE | DEEPER,
            **HEADS,
            query_pre_attn_scalar=12,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        ),
        24,
    ),
    "olmo2": (Olmo2Config(**SHAPE, rms_norm_eps=1e-6), 24),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Weights far enough from zero that attention is uneven, and norms and biases that are not at their start."""
    torch.manual_seed(seed)
    # Eager, because the fused implementations leave softcaps out.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Gemma stores norms as their distance from one.
            center = 1.0 if "norm" in name and "gemma" not in config.model_type else 0.0
            value.copy_(center + 0.2 * torch.randn_like(value))
    return model


def expected(model: PreTrainedModel, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens, labels, logits, greedy tokens, loss and the loss's gradient by tensor name; length: tokens per row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, model.config.vocab_size, (2, length), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.3, -100, tokens)
    output = model(input_ids=tokens, labels=labels)
    model.zero_grad()
    output.loss.backward()
    gradients = {f"gradient.{name}": value.grad.contiguous() for name, value in model.named_parameters()}
    with torch.no_grad():
        greedy = model.generate(tokens[:, :PROMPT], do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
    return {
        "tokens": tokens.to(torch.int32),
        "labels": labels.to(torch.int32),
        "logits": output.logits.detach().contiguous(),
        "greedy": greedy.to(torch.int32).contiguous(),
        "loss": output.loss.detach(),
        **gradients,
    }


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    for name, (config, length) in CASES.items():
        model = random_model(config)
        directory = FIXTURES / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        save_file(expected(model, length), directory / "expected.safetensors")


if __name__ == "__main__":
    main()
