"""I-SHEEP with Qwen1.5 7B and the paper's settings, on a TPU v5e-16.

Command:  python -m isheep_jax.train --config=qwen1_5_7b_v5e
Hardware: TPU v5e-16: 16 chips of 15.75 GiB.
Memory:   decoding 13.8 GiB per chip (weights 1.8, cache 12.0), train step 11.4 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 17.9 ms (670 tokens/s per chip), train step at least 0.166 s (6,175 tokens/s per chip),
          an iteration at least 5.08 minutes, 1.35 chip-hours; forecast: decode step 30.8 ms, train step 0.391 s, an
          iteration 13.1 minutes, 3.50 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_7b_v5e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-7B", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, tensor=2, decode_tensor=8, topology="v5e-16"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=192, max_length=2048),
    )
