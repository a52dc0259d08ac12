"""I-SHEEP with Llama 3 70B and the paper's settings, on a TPU v5p-64.

Command:  python -m isheep_jax.train --config=llama_70b_v5p
Weights:  python -m isheep_jax.fetch meta-llama/Meta-Llama-3-70B gs://BUCKET/MODEL, on all workers, once; then
          --model.path=gs://BUCKET/MODEL
Hardware: TPU v5p-64: 32 chips of 95.74 GiB.
Memory:   decoding 76.6 GiB per chip (weights 16.4, cache 60.0), train step 75.9 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 30.2 ms (3,179 tokens/s per chip), train step at least 0.325 s (1,575 tokens/s per chip),
          an iteration at least 4.47 minutes, 2.38 chip-hours; forecast: decode step 103 ms, train step 0.645 s, an
          iteration 10.7 minutes, 5.73 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="llama_70b_v5p",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-70B", chat_template="plain"),
        mesh=MeshConfig(data=16, fsdp=1, tensor=2, decode_tensor=8, topology="v5p-64"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=3072, max_length=2048),
    )
