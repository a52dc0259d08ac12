"""I-SHEEP with Qwen1.5 32B and the paper's settings, on a TPU v4-64.

Command:  python -m isheep_jax.train --config=qwen1_5_32b_v4
Hardware: TPU v4-64
"""

from isheep_jax.config import AssessConfig, Config, DecodeConfig, MeshConfig, ModelConfig, SelectConfig, SFTConfig


def config() -> Config:
    return Config(
        name="qwen1_5_32b_v4",
        iterations=4,
        model=ModelConfig(path="Qwen/Qwen1.5-32B", chat_template="chatml"),
        mesh=MeshConfig(fsdp=16, tensor=2, decode_tensor=8, topology="v4-64"),
        assess=AssessConfig(judge="base", read="sampled"),
        select=SelectConfig(at_most_order="first"),
        sft=SFTConfig(batch_rows=16),
        decode=DecodeConfig(slots=1280, context=2048),
    )
