"""I-SHEEP with Qwen1.5 4B and the paper's settings, on a TPU v5e-8.

Command:  python -m isheep_jax.train --config=qwen1_5_4b_v5e
Hardware: TPU v5e-8: 8 chips of 15.75 GiB.
Memory:   decoding 14.4 GiB per chip (weights 1.8, cache 12.5), train step 12.3 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.6 ms (862 tokens/s per chip), train step at least 0.175 s (11,731 tokens/s per chip),
          an iteration at least 7.01 minutes, 0.934 chip-hours; forecast: decode step 30.9 ms, train step 0.350 s, an
          iteration 16.6 minutes, 2.21 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_4b_v5e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-4B", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, decode_tensor=4, topology="v5e-8"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=128, max_length=2048),
    )
