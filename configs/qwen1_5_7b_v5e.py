"""I-SHEEP with Qwen1.5 7B and the paper's settings, on a TPU v5e-16.

Command:  python -m isheep_jax.train --config=qwen1_5_7b_v5e
Hardware: TPU v5e-16
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, MeshConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="qwen1_5_7b_v5e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-7B", chat_template="chatml"),
        mesh=MeshConfig(fsdp=16, decode_tensor=8, topology="v5e-16"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=160, context=2048, score_batch=16),
    )
