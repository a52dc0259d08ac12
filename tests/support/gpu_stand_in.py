"""Lets this machine's CPU stand in for a GPU: the code chooses what it would choose there.

Programs can then be lowered for CUDA, which needs no GPU. What is not a call of cuDNN also runs on the CPU.
"""

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from isheep_jax import sharding
from isheep_jax.decode import cache, programs
from isheep_jax.model import attention, attention_gpu


def stand_in(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None = (9, 0)) -> None:
    """Makes every mesh one of GPUs of a compute capability. None: of GPUs without cuDNN and our kernel."""
    for module in (sharding, cache, programs):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "gpu")
    for module in (attention, attention_gpu):
        monkeypatch.setattr(module, "compute_capability", lambda mesh: capability)
    # JAX asks the library itself, which comes with a GPU's driver.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces cuDNN by XLA in JAX's attention, which has the same arguments."""
    attention = jax.nn.dot_product_attention

    def in_xla(*arguments, implementation, **settings):
        assert implementation == "cudnn"
        return attention(*arguments, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
