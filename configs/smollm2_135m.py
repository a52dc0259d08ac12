"""The loop on SmolLM2 135M, the base model, on a CPU or one GPU.

Command:  python -m isheep_jax.train --config=smollm2_135m
Hardware: a CPU with 4 GB of free memory, or any GPU with as much.
Memory:   decoding 3.4 GiB (weights 0.5, cache 2.8), train step 1.0 GiB; planned, by the compiler for a CPU.
          On a GPU --decode.slots=0 takes as many slots as fit, and --model.compute_dtype=bfloat16 half the memory.
Speed:    on an H100 a decode step of the 32 slots with full caches at least 1.1 ms; planned, from the chip's peaks.
          On two CPU cores (AVX2) the check of the judge took less than three minutes; measured, with the chat model.
Result:   pairs are chosen by lift, backward lift, likelihood and ending, because models of this size cannot grade by
          the paper's rubric (docs/judging.md); the check before each iteration says whether it works with yours. What
          the loop gains is in docs/real_models.md, as far as it is measured.
A GGUF file in place of the hub's weights: --model.path=FILE.gguf, with the extra "gguf"; of a chat model also
--model.chat_template=auto.
"""

from isheep_jax.config import (
    AssessConfig,
    Config,
    DecodeConfig,
    ModelConfig,
    RespondConfig,
    SelectConfig,
    SFTConfig,
    SynthesizeConfig,
)


def config() -> Config:
    return Config(
        name="smollm2_135m",
        iterations=3,
        model=ModelConfig(path="HuggingFaceTB/SmolLM2-135M", chat_template="plain", compute_dtype="float32"),
        synthesize=SynthesizeConfig(instructions=500, temperature=0.7, max_tokens=300, rules="strict"),
        respond=RespondConfig(samples=2, temperature=(0.7,), max_tokens=200, base_prompt="chat"),
        assess=AssessConfig(readings=("lift", "backward_lift", "likelihood", "ending")),
        select=SelectConfig(rule="top_fraction", fraction=0.3, length_control="buckets"),
        sft=SFTConfig(
            learning_rate=2e-4, warmup_steps=5, epochs=3, sequence_length=512, batch_size=4, checkpoint_every=20
        ),
        decode=DecodeConfig(slots=32, max_length=2048),
    )
