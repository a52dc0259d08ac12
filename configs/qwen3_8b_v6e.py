"""I-SHEEP with Qwen3 8B and the paper's settings, on a TPU v6e-8.

Command:  python -m isheep_jax.train --config=qwen3_8b_v6e
Hardware: TPU v6e-8
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, MeshConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="qwen3_8b_v6e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen3-8B-Base", chat_template="chatml"),
        mesh=MeshConfig(fsdp=8, decode_tensor=4, topology="v6e-8"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=640, context=2048, score_batch=32),
    )
