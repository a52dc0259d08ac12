"""Writes tests/model/fixtures from Hugging Face's PyTorch models: `python tests/model/make_fixtures.py` where torch is.

Each fixture is a random model as transformers saves it (config.json, model.safetensors) and expected.safetensors:
tokens, labels (-100: no loss), logits, the mean loss and its gradient for every tensor, all in float32.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Name: (model, config, tokens per row). The scaled one is read far past the 32 positions of its original context, with
# a small theta so that the frequencies fall on both sides of the passage between stretched and not.
CASES: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, int]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True),
        24,
    ),
    "llama_scaled_rope": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        96,
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SHAPE, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        24,
    ),
}


def random_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Weights far enough from zero that attention is uneven, and norms and biases that are not at their start."""
    torch.manual_seed(seed)
    model = model_class(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            value.copy_(center + 0.2 * torch.randn_like(value))
    return model


def expected(model: PreTrainedModel, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tokens, labels, logits, loss and the loss's gradient by tensor name; length: tokens per row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.3, -100, tokens)
    output = model(input_ids=tokens, labels=labels)
    model.zero_grad()
    output.loss.backward()
    gradients = {f"gradient.{name}": value.grad.contiguous() for name, value in model.named_parameters()}
    return {
        "tokens": tokens.to(torch.int32),
        "labels": labels.to(torch.int32),
        "logits": output.logits.detach().contiguous(),
        "loss": output.loss.detach(),
        **gradients,
    }


def main() -> None:
    for name, (model_class, config, length) in CASES.items():
        model = random_model(model_class, config)
        directory = FIXTURES / name
        model.save_pretrained(directory)
        save_file(expected(model, length), directory / "expected.safetensors")


if __name__ == "__main__":
    main()
