"""I-SHEEP with Llama 3 8B and the paper's settings, on a TPU v5e-16.

Command:  python -m isheep_jax.train --config=llama_8b_v5e
Hardware: TPU v5e-16: 16 chips of 15.75 GiB.
Memory:   decoding 13.9 GiB per chip (weights 1.9, cache 12.0), train step 11.3 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.0 ms (2,663 tokens/s per chip), train step at least 0.173 s (5,908 tokens/s per chip),
          an iteration at least 2.63 minutes, 0.702 chip-hours; forecast: decode step 38.6 ms, train step 0.390 s, an
          iteration 8.10 minutes, 2.16 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="llama_8b_v5e",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-8B", chat_template="plain"),
        mesh=MeshConfig(data=8, fsdp=1, tensor=2, decode_tensor=8, topology="v5e-16"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=768, max_length=2048),
    )
