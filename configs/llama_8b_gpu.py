"""I-SHEEP with Llama 3 8B and the paper's settings, on one GPU of 80 GB.

Command:  python -m isheep_jax.train --config=llama_8b_gpu
Hardware: one GPU of 80 GB, such as an NVIDIA H100 or A100.
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="llama_8b_gpu",
        iterations=3,
        model=ModelConfig(path="meta-llama/Meta-Llama-3-8B", chat_template="llama3"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=128, context=2048, score_batch=16),
    )
