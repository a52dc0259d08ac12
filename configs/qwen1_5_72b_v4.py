"""I-SHEEP with Qwen1.5 72B and the paper's settings, on a TPU v4-256.

Command:  python -m isheep_jax.train --config=qwen1_5_72b_v4
Weights:  python -m isheep_jax.fetch Qwen/Qwen1.5-72B gs://BUCKET/MODEL, on all workers, once; then
          --model.path=gs://BUCKET/MODEL
Hardware: TPU v4-256: 128 chips of 30.75 GiB.
Memory:   decoding 26.7 GiB per chip (weights 4.2, cache 22.5), train step 23.0 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 23.8 ms (189 tokens/s per chip), train step at least 0.139 s (923 tokens/s per chip), an
          iteration at least 3.08 minutes, 6.58 chip-hours; forecast: decode step 50.2 ms, train step 0.573 s, an
          iteration 12.9 minutes, 27.6 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_72b_v4",
        iterations=6,
        model=ModelConfig(path="Qwen/Qwen1.5-72B", chat_template="chatml"),
        mesh=MeshConfig(data=16, fsdp=1, tensor=8, decode_tensor=32, topology="v4-256"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=576, max_length=2048),
    )
