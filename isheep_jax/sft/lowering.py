"""Lowers the programs of a fine-tuning on abstract arrays, as the trainer calls them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from isheep_jax.config import SFTConfig
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.sft.data import Batch
from isheep_jax.sft.train_step import TrainSetup, build_train_programs


def training_programs(
    architecture: Architecture, config: SFTConfig, mesh: Mesh, compute_dtype: str | jnp.dtype
) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Returns what lowers each program of a fine-tuning, by name. What is compiled of it, a fine-tuning finds compiled.

    Args:
        architecture: the model's.
        config: settings.
        mesh: the training mesh.
        compute_dtype: dtype of activations.
    """
    programs = build_train_programs(TrainSetup.from_config(architecture, config, mesh, compute_dtype))

    def array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    dtype = jnp.float32 if config.method == "full" else jnp.dtype(compute_dtype)
    params = jax.tree.map(
        lambda spec, sharding: array(spec.shape, dtype, sharding),
        parameter_table(architecture),
        programs.parameter_shardings,
    )
    base = params if config.method == "lora" else {}
    column = array((config.batch_size, config.sequence_length), jnp.int32, programs.batch_sharding)
    batch = Batch(column, column, column, column, column)
    rate, number = (array((), dtype, programs.replicated) for dtype in (jnp.float32, jnp.uint32))
    state = programs.abstract_state
    lowered = {
        "start of a fine-tuning": lambda: programs.init_state.lower(params, number),
        "train step": lambda: programs.train_step.lower(state, base, batch, rate, number, number),
    }
    if config.save == "model":
        lowered["weights after a fine-tuning"] = lambda: programs.export_params.lower(base, state.weights)
    if config.validation_fraction:
        lowered["validation loss"] = lambda: programs.validation_loss.lower(state.weights, base, batch)
    return lowered
