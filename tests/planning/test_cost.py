"""Counted arithmetic agrees with the compiler's own count, and rooflines name what limits a step."""

import dataclasses

import jax
import pytest
from architectures import small

from isheep_jax.config import Config, DecodeConfig, MeshConfig, ModelConfig, SFTConfig
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Cost, bound, matrix_parameters, program_flops, program_hbm_bytes
from isheep_jax.planning.hardware import Chip
from isheep_jax.planning.programs import make_meshes, make_program

# One layer, so that the compiler's count, which has each loop's body once, is of the whole program; wide enough that
# matrix products are nearly all of it.
ONE_LAYER = small(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    layers=1,
    head_dim=64,
    context_length=512,
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
CONFIG = Config(
    model=ModelConfig(compute_dtype="float32"),
    mesh=MeshConfig(fsdp=1),
    sft=SFTConfig(batch_size=4, sequence_length=128, lora_dropout=0.0),
    decode=DecodeConfig(slots=16, steps_per_call=1, max_length=128),
)
CHIP = Chip("test", flops=100.0, hbm=1e9, hbm_bandwidth=10.0, interconnect=1.0)


def with_sft(**changes) -> Config:
    return dataclasses.replace(CONFIG, sft=dataclasses.replace(CONFIG.sft, **changes))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (programs.PREFILL, CONFIG),
        (programs.DECODE, CONFIG),
        (programs.SCORE, CONFIG),
        (programs.TRAIN, with_sft(method="full", remat="full")),
        (programs.TRAIN, with_sft(method="full", remat="none")),
        (programs.TRAIN, with_sft(method="lora", remat="full")),
        (programs.TRAIN, with_sft(method="lora", remat="selective")),
        (programs.TRAIN, with_sft(method="lora", remat="none")),
    ],
)
def test_counted_operations_are_those_of_compiler(name, config):
    meshes = make_meshes(config, ONE_LAYER, jax.devices()[:1])
    program = make_program(name, config, ONE_LAYER, meshes)
    # Counted before optimization, which may turn products with few rows into loops that the compiler counts as sums.
    compilers = program.lower().cost_analysis()["flops"]
    ours = program_flops(program, config, ONE_LAYER)
    assert ours == pytest.approx(compilers, rel=0.1)


def test_decode_step_reads_weights_once_and_whole_cache():
    meshes = make_meshes(CONFIG, ONE_LAYER, jax.devices()[:1])
    program = make_program(programs.DECODE, CONFIG, ONE_LAYER, meshes)
    layers, head = matrix_parameters(ONE_LAYER)
    norms = 3 * ONE_LAYER.hidden_size
    cache = 2 * 16 * 128 * ONE_LAYER.kv_heads * ONE_LAYER.head_dim
    assert program_hbm_bytes(program, CONFIG, ONE_LAYER, meshes) == 4 * (layers + head + norms + cache)


def test_integers_and_their_scales_are_what_int8_step_reads():
    config = dataclasses.replace(
        CONFIG, decode=dataclasses.replace(CONFIG.decode, weights_dtype="int8", kv_cache_dtype="int8")
    )
    meshes = make_meshes(config, ONE_LAYER, jax.devices()[:1])
    program = make_program(programs.DECODE, config, ONE_LAYER, meshes)
    layers, head = matrix_parameters(ONE_LAYER)
    outputs = (4 + 2 + 2) * 64 + 256 + 2 * 768 + 256
    # The embeddings' scales are counted as read, too, though only some are.
    floats = 3 * ONE_LAYER.hidden_size + outputs + 2 * ONE_LAYER.vocab_size
    tokens, heads = 16 * 128, ONE_LAYER.kv_heads
    cache = 2 * tokens * heads * (ONE_LAYER.head_dim + 4)
    assert program.cache == cache
    assert program.weights == layers + 2 * head + 4 * floats
    assert program_hbm_bytes(program, config, ONE_LAYER, meshes) == layers + head + 4 * floats + cache
    memory = program.lower().compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(program.weights + program.cache, rel=0.01)


@pytest.mark.parametrize(
    ("cost", "by", "seconds"),
    [
        (Cost(1000.0, 50.0, 2.0), "compute", 10.0),
        (Cost(100.0, 50.0, 2.0), "memory", 5.0),
        (Cost(100.0, 5.0, 2.0), "interconnect", 2.0),
    ],
)
def test_slowest_part_bounds_step(cost, by, seconds):
    result = bound(cost, CHIP)
    assert (result.by, result.seconds) == (by, seconds)


def test_single_device_has_no_interconnect_to_wait_for():
    assert bound(Cost(1.0, 1.0, 1e9), dataclasses.replace(CHIP, interconnect=0.0)).interconnect == 0.0
