"""I-SHEEP with Qwen3 8B and the paper's settings, on a TPU v6e-8.

Command:  python -m isheep_jax.train --config=qwen3_8b_v6e
Hardware: TPU v6e-8: 8 chips of 31.25 GiB.
Memory:   decoding 28.8 GiB per chip (weights 3.8, cache 24.8), train step 21.9 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.5 ms (4,748 tokens/s per chip), train step at least 0.076 s (26,949 tokens/s per
          chip), an iteration at least 1.74 minutes, 0.232 chip-hours; forecast: decode step 33.6 ms, train step 0.243
          s, an iteration 6.40 minutes, 0.854 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
