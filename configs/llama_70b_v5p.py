"""I-SHEEP with Llama 3 70B and the paper's settings, on a TPU v5p-64.

Command:  python -m isheep_jax.train --config=llama_70b_v5p
Hardware: TPU v5p-64
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, MeshConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="llama_70b_v5p",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-70B", chat_template="llama3"),
        mesh=MeshConfig(fsdp=16, tensor=2, decode_tensor=8, topology="v5p-64"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=3072, context=2048),
    )
