"""A Llama of two small layers, to be changed where a test needs another size or family."""

import dataclasses

from isheep_jax.model.architecture import Architecture

_SMALL = Architecture(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    context_length=64,
    tied_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(1,),
)


def small(**changes) -> Architecture:
    """Returns the small architecture with some of its fields changed."""
    return dataclasses.replace(_SMALL, **changes)
