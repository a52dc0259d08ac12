"""A GPU's steps take what stated shares of its peaks allow, and the launches of their kernels."""

import dataclasses

import jax
import pytest

from isheep_jax.named_configs import named_config
from isheep_jax.planning import programs
from isheep_jax.planning.cost import matrix_parameters
from isheep_jax.planning.gpu_time import COMPUTE_SHARE, KERNELS, LAUNCH, LOOP_TURN, MEMORY_SHARE, gpu_step_times
from isheep_jax.planning.hardware import gpu_chip
from isheep_jax.planning.models import planned_architecture
from isheep_jax.planning.programs import make_meshes, make_program
from isheep_jax.planning.step_time import SAMPLING_TRIES


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    config = named_config("llama_8b_gpu")
    architecture = planned_architecture(config.model.path, tmp_path_factory.mktemp("work"))
    meshes = make_meshes(config, architecture, jax.devices()[:1])
    return config, architecture, meshes, gpu_step_times(config, architecture, meshes, gpu_chip("H100"))


def test_decode_step_reads_weights_and_blocks_of_cache_and_launches_kernels(planned):
    config, architecture, meshes, times = planned
    program = make_program(programs.DECODE, config, architecture, meshes)
    head = matrix_parameters(architecture)[1]
    read = program.weights - 2 * head + program.cache / 4
    expected = read / (MEMORY_SHARE * 3350e9)
    expected += architecture.layers * KERNELS * LAUNCH + SAMPLING_TRIES * LOOP_TURN
    assert times.block == 512
    assert times.decode[128][0].seconds == pytest.approx(expected)


def test_train_step_is_bound_by_products(planned):
    config, architecture, _, times = planned
    layers, head = matrix_parameters(architecture)
    tokens = config.sft.batch_size * config.sft.sequence_length
    # Frozen weights have no gradients: forward, forward again, backward; the head's logits are computed twice.
    products = 2 * tokens * (3 * layers + 3 * head) / (COMPUTE_SHARE * 989e12)
    assert times.train.seconds == pytest.approx(products, rel=0.1)


def test_few_slots_read_less_cache_and_same_weights(planned):
    *_, times = planned
    few, many = (times.decode[slots] for slots in (32, 128))
    per_block = [step[1].compute - step[0].compute for step in (few, many)]
    assert per_block[1] == pytest.approx(4 * per_block[0])
    assert few[0].compute - per_block[0] == pytest.approx(many[0].compute - per_block[1])
    assert dataclasses.asdict(few[0])["host"] == many[0].host
