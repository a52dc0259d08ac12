"""I-SHEEP with Qwen1.5 14B and the paper's settings, on a TPU v4-32.

Command:  python -m isheep_jax.train --config=qwen1_5_14b_v4
Hardware: TPU v4-32: 16 chips of 30.75 GiB.
Memory:   decoding 28.3 GiB per chip (weights 3.3, cache 25.0), train step 18.9 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 25.2 ms (636 tokens/s per chip), train step at least 0.218 s (4,689 tokens/s per chip),
          an iteration at least 5.78 minutes, 1.54 chip-hours; forecast: decode step 43.7 ms, train step 0.573 s, an
          iteration 15.9 minutes, 4.24 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_14b_v4",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-14B", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, tensor=2, decode_tensor=8, topology="v4-32"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=256, max_length=2048),
    )
