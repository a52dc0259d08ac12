"""What responses depend on besides weights and prompts, for the record of an evaluation."""

import hashlib
from typing import Any

import jax.numpy as jnp

from isheep_jax.checkpoint.pretrained import Pretrained
from isheep_jax.config import DecodeConfig


def decoding_facts(model: Pretrained, decode: DecodeConfig, dtype: jnp.dtype, seed: int) -> dict[str, Any]:
    """Returns the facts as JSON values.

    chat_template: sha256 of the template's source; "" without a template.
    """
    template = model.tokenizer.chat_template
    return {
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template else "",
        "compute_dtype": jnp.dtype(dtype).name,
        "weights_dtype": decode.weights_dtype,
        "kv_cache_dtype": decode.kv_cache_dtype,
        "max_length": min(decode.max_length or model.architecture.context_length, model.architecture.context_length),
        "seed": seed,
    }
