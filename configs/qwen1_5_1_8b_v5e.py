"""I-SHEEP with Qwen1.5 1.8B and the paper's settings, on a TPU v5e-8.

Command:  python -m isheep_jax.train --config=qwen1_5_1_8b_v5e
Hardware: TPU v5e-8
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, MeshConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="qwen1_5_1_8b_v5e",
        iterations=3,
        model=ModelConfig(path="Qwen/Qwen1.5-1.8B", chat_template="chatml"),
        mesh=MeshConfig(fsdp=8, decode_tensor=4, topology="v5e-8"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=288, context=2048),
    )
