"""I-SHEEP with Llama 3 70B and the paper's settings, on a TPU v6e-8.

Command:  python -m isheep_jax.train --config=llama_70b_v6e
Weights:  python -m isheep_jax.fetch meta-llama/Meta-Llama-3-70B gs://BUCKET/MODEL, once; then
          --model.path=gs://BUCKET/MODEL
Hardware: TPU v6e-8: 8 chips of 31.25 GiB. It is the smallest slice that holds the model in bfloat16, 16.4 GiB per chip,
          next to a cache, and trains adapters on it; one host, so that nothing crosses the data center's network. It is
          also what the checks of vLLM on TPUs run the model on (`plan --shape=1800/128`).
Memory:   decoding 29.0 GiB per chip (weights 16.4, cache 12.5), train step 24.9 GiB; planned, by the TPU's compiler.
Speed:    decode step at least 18.8 ms (1,064 tokens/s per chip), train step at least 0.956 s (2,142 tokens/s per chip),
          an iteration at least 16.0 minutes, 2.13 chip-hours; forecast: decode step 34.8 ms, train step 3.25 s, an
          iteration 49.5 minutes, 6.60 chip-hours; planned, from the chip's peaks and the compiler's cycles.
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
        name="llama_70b_v6e",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-70B", chat_template="plain"),
        mesh=MeshConfig(fsdp=8, decode_tensor=8, topology="v6e-8"),
        synthesize=SynthesizeConfig(novelty_scope="iteration"),
        assess=AssessConfig(framing="text", judge="base", read="sampled", parser="paper"),
        select=SelectConfig(max_pairs_order="first"),
        sft=SFTConfig(save="adapter", batch_size=16, packing=False),
        decode=DecodeConfig(slots=160, max_length=2048),
    )
