"""What is lowered ahead is what a fine-tuning calls."""

import dataclasses

import jax.numpy as jnp
import pytest
from meshes import mesh_of
from small_model import LLAMA, SETTINGS, tune

from isheep_jax.runtime.compilations import compilations
from isheep_jax.sft.lowering import training_programs

# Programs of the trainer; what else it compiles is small.
PROGRAMS = {f"jit({name})" for name in ("init_state", "train_step", "loss", "export_params")}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_fine_tuning_compiles_nothing_that_was_compiled_ahead(tmp_path, method):
    # Settings of no other test: what this process has compiled for those is known already.
    settings = {"method": method, "weight_decay": 0.0123, "validation_fraction": 0.1}
    config = dataclasses.replace(SETTINGS, **settings)
    before = compilations()
    for lower in training_programs(LLAMA, config, mesh_of(), jnp.float32).values():
        lower().compile()
    ahead = compilations() - before
    assert (ahead.compiled + ahead.cached).keys() >= PROGRAMS
    before = compilations()
    tune(tmp_path, **settings)
    later = compilations() - before
    assert not PROGRAMS & (later.compiled + later.cached).keys()
