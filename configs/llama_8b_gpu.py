"""I-SHEEP with Llama 3 8B and the paper's settings, on one GPU of 80 GB.

Command:  python -m isheep_jax.train --config=llama_8b_gpu
Hardware: one GPU of 80 GB, such as an NVIDIA H100 or A100.
Memory:   decoding 47.5 GiB (weights 15.0, cache 32.0), train step 23.6 GiB; compiled for an H100 (docs/gpu.md).
Speed:    on an H100 decode step at least 14.7 ms (8,690 tokens/s), train step at least 0.784 s (20,900 tokens/s), an
          iteration at least 12.1 minutes, 0.202 chip-hours; forecast: decode step 23.6 ms, train step 1.57 s, an
          iteration 26.1 minutes, 0.435 chip-hours; planned, from the GPU's peaks and assumed shares of them:
          `python -m isheep_jax.plan --config=llama_8b_gpu --gpu=H100`.
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, ModelConfig, SelectConfig, SFTConfig, SynthesizeConfig


def config() -> Config:
    return Config(
        name="llama_8b_gpu",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-8B", chat_template="plain"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(batch_size=16, packing=False),
        decode=DecodeConfig(slots=128, max_length=2048),
    )
