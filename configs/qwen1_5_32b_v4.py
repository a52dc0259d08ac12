"""I-SHEEP with Qwen1.5 32B and the paper's settings, on a TPU v4-64.

Command:  python -m isheep_jax.train --config=qwen1_5_32b_v4
Weights:  python -m isheep_jax.fetch Qwen/Qwen1.5-32B gs://BUCKET/MODEL, on all workers, once; then
          --model.path=gs://BUCKET/MODEL
Hardware: TPU v4-64: 32 chips of 30.75 GiB.
Memory:   decoding 27.6 GiB per chip (weights 7.6, cache 20.0), train step 22.5 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 24.5 ms (1,632 tokens/s per chip), train step at least 0.250 s (2,048 tokens/s per chip),
          an iteration at least 3.50 minutes, 1.87 chip-hours; forecast: decode step 59.6 ms, train step 0.840 s, an
          iteration 12.1 minutes, 6.43 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="qwen1_5_32b_v4",
        iterations=4,
        model=ModelConfig(path="Qwen/Qwen1.5-32B", chat_template="chatml"),
        mesh=MeshConfig(data=8, fsdp=1, tensor=4, decode_tensor=8, topology="v4-64"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=1280, max_length=2048),
    )
