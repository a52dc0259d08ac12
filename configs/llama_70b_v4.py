"""I-SHEEP with Llama 3 70B and the paper's settings, on a TPU v4-256.

Command:  python -m isheep_jax.train --config=llama_70b_v4
Weights:  python -m isheep_jax.fetch meta-llama/Meta-Llama-3-70B gs://BUCKET/MODEL, on all workers, once; then
          --model.path=gs://BUCKET/MODEL
Hardware: TPU v4-256: 128 chips of 30.75 GiB.
Memory:   decoding 27.7 GiB per chip (weights 16.4, cache 11.2), train step 21.3 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 24.5 ms (733 tokens/s per chip), train step at least 0.136 s (944 tokens/s per chip), an
          iteration at least 2.12 minutes, 4.52 chip-hours; forecast: decode step 53.1 ms, train step 0.549 s, an
          iteration 7.77 minutes, 16.6 chip-hours; planned, from the chip's peaks and the compiler's cycles.
Larger:   rows of 4,096 tokens fit as well (--sft.sequence_length=4096 --sft.remat=full, train step 24.9 GiB), and so do
          all weights trained, which have to be split further and saved whole, also with such rows:
          --sft.method=full --sft.remat=full --sft.save=model --mesh.data=1 --mesh.fsdp=16; planned.
Smaller:  with LoRA a v4-64 (32 chips) is enough: --mesh.topology=v4-64 --mesh.data=1 --mesh.fsdp=4 --decode.slots=576
          (decoding 27.7 GiB per chip, train step 22.3 GiB; planned).
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
        name="llama_70b_v4",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-70B", chat_template="plain"),
        mesh=MeshConfig(data=16, fsdp=1, tensor=8, decode_tensor=8, topology="v4-256"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", remat="selective", batch_size=16, packing=False),
        decode=DecodeConfig(slots=2304, max_length=2048),
    )
