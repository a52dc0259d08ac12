"""Memory of compiled programs: its parts, whether it fits, and the setting to change when it does not."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from isheep_jax.config import MeshConfig
from isheep_jax.named_configs import named_config
from isheep_jax.planning import programs
from isheep_jax.planning.compile import Compiled, Memory, advice, compile_program, memory_split
from isheep_jax.planning.models import planned_architecture
from isheep_jax.planning.programs import Program, make_meshes, make_program

PROGRAM = Program(programs.DECODE, lower=None, weights=10.0, optimizer=0.0, cache=5.0, rows=1, tokens=1)


def analysis(**sizes):
    return SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    config = named_config("tiny")
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=4, tensor=2, decode_tensor=2))
    architecture = planned_architecture("tiny", tmp_path_factory.mktemp("work"))
    return config, architecture, make_meshes(config, architecture, jax.devices())


def test_arguments_outputs_and_temporaries_less_aliases_are_total():
    memory = memory_split(PROGRAM, analysis(argument=18, output=7, temp=3, alias=5))
    assert (memory.temporaries, memory.other) == (3 + 7 - 5, 18 - 15)
    assert memory.total == 18 + 7 + 3 - 5


def test_argument_that_program_does_not_use_still_takes_its_place():
    assert memory_split(PROGRAM, analysis(argument=9, output=0, temp=0, alias=0)).total == 15


def test_twentieth_of_memory_stays_free():
    compiled = Compiled(PROGRAM, 1.0, Memory(10.0, 0.0, 5.0, 4.0, 0.0))
    assert compiled.fits(20.0)
    assert not compiled.fits(19.9)


@pytest.mark.parametrize("name", programs.NAMES)
def test_arguments_of_real_programs_are_what_their_shardings_say(name, tiny):
    config, architecture, meshes = tiny
    compiled = compile_program(make_program(name, config, architecture, meshes))
    batch = 5 * 4 * config.sft.batch_size * config.sft.sequence_length + 1024
    rows = 16 * config.decode.slots * (config.decode.max_length + 8)
    assert not compiled.error
    assert 0 <= compiled.memory.other <= max(batch, rows)
    assert compiled.memory.temporaries > 0
    assert any(c.kind == "all-reduce" for c in compiled.collectives)  # tensor=2


def test_program_too_large_for_compiler_is_result(monkeypatch):
    def lower():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (39.04G) "
            "exceeds available HBM (30.75G)."
        )

    compiled = compile_program(dataclasses.replace(PROGRAM, lower=lower))
    assert compiled.memory.temporaries == 39.04 * 2**30
    assert "39.04G" in compiled.error
    assert not compiled.fits(1e15)


@pytest.mark.parametrize(
    ("name", "memory", "changes", "setting"),
    [
        (programs.DECODE, Memory(1, 0, 9, 1, 0), {}, "--decode.slots=64"),
        (programs.DECODE, Memory(9, 0, 1, 1, 0), {}, "--mesh.decode_tensor=4"),
        (programs.PREFILL, Memory(1, 0, 1, 9, 0), {}, "--decode.max_length=64"),
        (programs.TRAIN, Memory(9, 9, 0, 1, 0), {"method": "full"}, "--sft.method=lora"),
        (programs.TRAIN, Memory(9, 0, 0, 1, 0), {"method": "lora"}, "--mesh.topology"),
        (programs.TRAIN, Memory(1, 1, 0, 9, 0), {"remat": "none"}, "--sft.remat=selective"),
        (programs.TRAIN, Memory(1, 1, 0, 9, 0), {"remat": "selective"}, "--sft.remat=full"),
        (programs.TRAIN, Memory(1, 1, 0, 9, 0), {"remat": "full", "batch_size": 8}, "--sft.batch_size=4"),
        (programs.TRAIN, Memory(1, 1, 0, 9, 0), {"remat": "full"}, "--sft.sequence_length=64"),
    ],
)
def test_advice_names_setting_that_shrinks_largest_part(name, memory, changes, setting, tiny):
    config, architecture, meshes = tiny
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, **changes))
    program = dataclasses.replace(PROGRAM, name=name)
    assert setting in advice(Compiled(program, 1.0, memory), config, architecture, meshes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_repeated_are_to_be_split_instead(method, tiny):
    config, architecture, _ = tiny
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2, decode_tensor=2),
        sft=dataclasses.replace(config.sft, method=method),
    )
    meshes = make_meshes(config, architecture, jax.devices())
    program = dataclasses.replace(PROGRAM, name=programs.TRAIN)
    told = advice(Compiled(program, 1.0, Memory(9, 1, 0, 1, 0)), config, architecture, meshes)
    assert told == "--mesh.data=1 --mesh.fsdp=4"
