"""I-SHEEP with Qwen1.5 1.8B and the paper's settings, on a TPU v5e-8.

Command:  python -m isheep_jax.train --config=qwen1_5_1_8b_v5e
Hardware: TPU v5e-8: 8 chips of 15.75 GiB.
Memory:   decoding 14.4 GiB per chip (weights 0.9, cache 13.5), train step 6.3 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.6 ms (1,932 tokens/s per chip), train step at least 0.079 s (26,009 tokens/s per
          chip), an iteration at least 2.83 minutes, 0.378 chip-hours; forecast: decode step 31.0 ms, train step 0.178
          s, an iteration 7.18 minutes, 0.958 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_1_8b_v5e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-1.8B", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, decode_tensor=4, topology="v5e-8"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=288, max_length=2048),
    )
