"""The whole loop on the embedded model, on a laptop's CPU.

Command:  python -m isheep_jax.train --config=tiny
Hardware: two CPU cores, 2 GB of memory.
Time:     about two minutes on two cores, measured.
Result:   held-out accuracy from .14 to about .9 in three iterations, measured; the README has the table.
"""

from isheep_jax.config import (
    AssessConfig,
    Config,
    DecodeConfig,
    EvaluateConfig,
    ModelConfig,
    RespondConfig,
    RetrievalConfig,
    SelectConfig,
    SFTConfig,
    SynthesizeConfig,
)


def config() -> Config:
    return Config(
        name="tiny",
        iterations=3,
        prompts="tiny",
        model=ModelConfig(path="tiny", compute_dtype="float32"),
        synthesize=SynthesizeConfig(
            instructions=512, shots=3, temperature=1.0, top_p=1.0, max_tokens=80, rules="basic", novelty=1.0
        ),
        respond=RespondConfig(
            samples=4, temperature=(0.6,), top_p=1.0, max_tokens=40, base_prompt="chat", rules="basic"
        ),
        retrieval=RetrievalConfig(examples=3),
        assess=AssessConfig(framing="text", judge="current", read="expected"),
        select=SelectConfig(rule="top_fraction", fraction=0.3, buckets="opening", following_ceiling=7.5),
        sft=SFTConfig(
            method="full",
            learning_rate=3e-4,
            warmup_steps=2,
            epochs=5,
            sequence_length=128,
            batch_size=4,
            validation_fraction=0.0,
            remat="none",
        ),
        decode=DecodeConfig(slots=128, steps_per_call=16, max_length=128),
        evaluate=EvaluateConfig(tasks=("tiny",), limit=512),
    )
