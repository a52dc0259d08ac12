"""Loads a model for generation and scoring outside the loop, as `isheep_jax.load` and the command generate do."""

import dataclasses

import jax.numpy as jnp

from isheep_jax.checkpoint.pretrained import Pretrained
from isheep_jax.config import DecodeConfig, MeshConfig
from isheep_jax.decode.cache import data_shards
from isheep_jax.decode.engine import Engine
from isheep_jax.model.architecture import parameter_table
from isheep_jax.runtime.devices import default_dtype, use_compilation_cache
from isheep_jax.runtime.locate import locate_model
from isheep_jax.runtime.opening import open_located
from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh

# Enough for a few prompts; the loop sizes its engine by the memory of the devices.
DEFAULT_DECODE = DecodeConfig(slots=64, max_length=2048)


def load(
    model: str,
    *,
    chat_template: str = "auto",
    decode: DecodeConfig = DEFAULT_DECODE,
    decode_tensor: int = 1,
    compute_dtype: str = "auto",
    seed: int = 0,
) -> Engine:
    """Loads a model onto all devices.

    Args:
        model: A directory in Hugging Face format (local or gs://), a GGUF file, a run's directory (its newest model), a
            hub id (org/name or org/name@revision), or "tiny" (the embedded model).
        chat_template: "auto" (the tokenizer's own) or a name, as `model.chat_template`.
        decode: Slots are rounded up to a multiple of the replicas of the weights; max_length is at most the model's.
        decode_tensor: Shards of heads and feed-forward units; the other devices hold replicas of the weights.
        compute_dtype: "float32", "bfloat16", or "auto" for float32 on CPUs and bfloat16 elsewhere.
        seed: With it and its id, a request always gets the same completion.

    Raises `UserError` when there is no such model or it does not fit the devices.
    """
    return make_engine(
        open_located(locate_model(model, adapters=True), chat_template),
        decode=decode,
        decode_tensor=decode_tensor,
        compute_dtype=compute_dtype,
        seed=seed,
    )


def make_engine(
    model: Pretrained, *, decode: DecodeConfig, decode_tensor: int, compute_dtype: str, seed: int
) -> Engine:
    """Loads the weights of an opened model, as `load`."""
    use_compilation_cache()
    mesh = decode_mesh(make_mesh(MeshConfig()), decode_tensor)
    dtype = jnp.dtype(default_dtype() if compute_dtype == "auto" else compute_dtype)
    shards = data_shards(mesh)
    decode = dataclasses.replace(
        decode,
        slots=-(-decode.slots // shards) * shards,
        max_length=min(decode.max_length, model.architecture.context_length),
    )
    check_divisible(parameter_table(model.architecture), mesh, DECODE_RULES)  # before the weights are read
    params = model.load(mesh=mesh, rules=DECODE_RULES, dtype=dtype)
    return Engine(params, model.architecture, model.tokenizer, decode, mesh=mesh, seed=seed, compute_dtype=dtype)
