"""What responses depend on besides weights and prompts, for the record of an evaluation."""

import hashlib
from typing import Any

import jax.numpy as jnp

from isheep_jax.checkpoint.pretrained import Pretrained
from isheep_jax.config import DecodeConfig
from isheep_jax.text.conversation import Message


def decoding_facts(model: Pretrained, decode: DecodeConfig, dtype: jnp.dtype, seed: int) -> dict[str, Any]:
    """Returns the facts as JSON values.

    chat_template: sha256 of a conversation as the template renders it; "" without a template.
    """
    template = ""
    if model.tokenizer.has_chat_template:
        rendered = model.tokenizer.render((Message("user", "question"),), "answer")
        template = hashlib.sha256(rendered.encode()).hexdigest()
    return {
        "chat_template": template,
        "compute_dtype": jnp.dtype(dtype).name,
        "weights_dtype": decode.weights_dtype,
        "kv_cache_dtype": decode.kv_cache_dtype,
        "max_length": min(decode.max_length or model.architecture.context_length, model.architecture.context_length),
        "seed": seed,
    }
