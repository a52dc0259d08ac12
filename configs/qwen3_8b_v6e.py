"""I-SHEEP with Qwen3 8B and the paper's settings, on a TPU v6e-8.

Command:  python -m isheep_jax.train --config=qwen3_8b_v6e
Hardware: TPU v6e-8: 8 chips of 31.25 GiB.
Memory:   decoding 28.7 GiB per chip (weights 3.8, cache 24.8), train step 4.0 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.5 ms (4,748 tokens/s per chip), train step at least 0.121 s (16,872 tokens/s per
          chip), an iteration at least 1.99 minutes, 0.265 chip-hours; planned, from the chip's peaks.
"""

from isheep_jax.config import (
    AssessConfig,
    Config,
    DecodeConfig,
    MeshConfig,
    ModelConfig,
    SelectConfig,
    SFTConfig,
    SynthesizeConfig,
)


def config() -> Config:
    return Config(
        name="qwen3_8b_v6e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen3-8B-Base", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, decode_tensor=4, topology="v6e-8"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=704, max_length=2048),
    )
