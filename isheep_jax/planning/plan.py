"""Makes the plan of a config: compiles its programs for its hardware and says what they need and whether they fit."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.config import Config, flatten
from isheep_jax.decode.cache import ROW_TOKENS, Sizing, data_shards
from isheep_jax.decode.capacity import local_memory, step_bytes
from isheep_jax.decode.programs import clear_programs
from isheep_jax.model.architecture import Architecture, parameter_count, parameter_table
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.model.attention_gpu import KERNEL_BLOCK, LEAST_CAPABILITY, kernel_refusal
from isheep_jax.planning import iteration, programs
from isheep_jax.planning.collectives import Collective, by_kind
from isheep_jax.planning.compile import HEADROOM, Compiled, advice, compile_program, uncompiled
from isheep_jax.planning.cost import Bound, Cost, bound, program_flops, program_hbm_bytes
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.gpu_time import gpu_step_times
from isheep_jax.planning.hardware import (
    GIB,
    GPU_MEMORY_SHARE,
    Chip,
    Slice,
    gpu_chip,
    local_chip,
    parse_topology,
    slice_devices,
)
from isheep_jax.planning.iteration import Bounds, IterationPlan, Machine, plan_iteration
from isheep_jax.planning.programs import Meshes, Program, decode_shape, few_slots, make_meshes, make_program
from isheep_jax.planning.replay import SupposedModel
from isheep_jax.planning.serving import Shape, Throughput, throughput
from isheep_jax.planning.step_time import Replay, StepTime
from isheep_jax.planning.torus import Torus
from isheep_jax.planning.transfers import Hosts, adapter_bytes
from isheep_jax.runtime.host_memory import KEPT_SHARE, free_host_memory

# Prefixes of the settings that decide what the programs need; the written plan has these settings.
_SETTINGS = ("mesh.", "decode.", "sft.method", "sft.lora_rank", "sft.sequence_length", "sft.batch_size", "sft.remat")


@dataclass(frozen=True)
class Hardware:
    """The devices that a config is compiled for.

    chip: None without public figures (a CPU).
    tpu_slice: each of the slices; None for the devices of this machine.
    is_here: False where nothing can be compiled for them: their programs are counted, not compiled.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    hbm: float
    tpu_slice: Slice | None = None
    is_here: bool = True

    @property
    def hosts(self) -> int:
        """Machines that the devices are attached to."""
        if self.tpu_slice is None:
            return len({device.process_index for device in self.devices})
        return -(-len(self.devices) // self.tpu_slice.chips_per_host)

    @property
    def host_memory(self) -> float:
        """Bytes of a host's memory that are free as a run begins; 0 where they are not known or the devices' own."""
        if self.tpu_slice is not None:
            return self.tpu_slice.host_memory
        return free_host_memory() if self.is_here and self.devices[0].platform != "cpu" else 0.0


@dataclass(frozen=True)
class ProgramPlan:
    """A program and its needs. bound: None without the figures of a chip. advice: the setting to change, or ""."""

    compiled: Compiled
    cost: Cost
    bound: Bound | None
    fits: bool
    advice: str


@dataclass(frozen=True)
class Plan:
    """All programs of a config on its hardware. times: forecast times of their steps; None where nothing is known."""

    config: Config
    architecture: Architecture
    hardware: Hardware
    meshes: Meshes
    programs: dict[str, ProgramPlan]
    times: StepTimes | None = None

    @property
    def fits(self) -> bool:
        return all(p.fits for p in self.programs.values())

    @functools.cached_property
    def iteration(self) -> IterationPlan:
        """The iteration, of a plan of all programs on a chip with known peaks; replaying it takes seconds."""
        made = {name: p.compiled.program for name, p in self.programs.items()}
        machine = Machine(_supposed(self), _hosts(self))
        return plan_iteration(self.config, made, _bounds(self), machine, self.times)


def find_hardware(config: Config, gpu: str = "") -> Hardware:
    """Returns the slices of `mesh.topology`, one GPU that is not here by its name, or the devices of this machine."""
    if gpu:
        chip = gpu_chip(gpu)
        # One device of any kind has the programs and sizes of one GPU.
        return Hardware(f"one {chip.name}", jax.devices()[:1], chip, GPU_MEMORY_SHARE * chip.hbm, is_here=False)
    if config.mesh.topology:
        tpu_slice = parse_topology(config.mesh.topology)
        devices = slice_devices(config.mesh.topology, config.mesh.slices)
        chips = f"{len(devices)} {tpu_slice.chip.name} chip{'s' if len(devices) > 1 else ''}"
        slices = f"{config.mesh.slices} x " if config.mesh.slices > 1 else ""
        name = f"{slices}{config.mesh.topology}: {chips}"
        return Hardware(name, devices, tpu_slice.chip, tpu_slice.chip.hbm, tpu_slice)
    devices = jax.devices()
    name = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''} of this machine"
    return Hardware(name, devices, local_chip(devices[0]), local_memory(devices[0]))


def make_plan(
    config: Config,
    architecture: Architecture,
    hardware: Hardware,
    names: tuple[str, ...] = programs.NAMES,
    on_program: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Compiles programs one after the other, and returns what they need.

    Args:
        config: settings.
        architecture: the model's.
        hardware: to compile for.
        names: the programs, of `programs.NAMES`.
        on_program: called with the name of each program before it is compiled.
    """
    meshes = make_meshes(config, architecture, hardware.devices)
    # Programs that a search has compiled are compiled again, because the plan has their compilation times.
    clear_programs()
    jax.clear_caches()
    plans = {}
    for name in names:
        on_program(name)
        program = make_program(name, config, architecture, meshes)
        compiled = compile_program(program) if hardware.is_here else uncompiled(program)
        plans[name] = plan_program(compiled, config, architecture, meshes, hardware)
    times = None
    if hardware.chip and set(names) == set(programs.NAMES) and all(p.fits for p in plans.values()):
        compiled = {name: p.compiled for name, p in plans.items()}
        times = _step_times(compiled, config, architecture, meshes, hardware, on_program)
    return Plan(config, architecture, hardware, meshes, plans, times)


def _step_times(
    compiled: dict[str, Compiled],
    config: Config,
    architecture: Architecture,
    meshes: Meshes,
    hardware: Hardware,
    on_program: Callable[[str], None],
) -> StepTimes:
    """Returns the forecast times of the programs' steps; on TPUs smaller steps are compiled as well.

    Args:
        compiled: the programs, by name.
        config: settings.
        architecture: the model's.
        meshes: those of the config.
        hardware: its chip and slices.
        on_program: called with the name of each program before it is compiled.
    """
    if hardware.tpu_slice is None:
        return gpu_step_times(config, architecture, meshes, hardware.chip)
    shards, block = data_shards(meshes.decode), decode_shape(config, architecture, meshes).read_block
    positions = range(block, -(-config.decode.max_length // block) * block + 1, block)

    def replay(one: Compiled) -> Replay:
        mesh = meshes.train if one.program.name == programs.TRAIN else meshes.decode
        return Replay(one.module, hardware.chip, Torus.of(mesh, hardware.tpu_slice))

    def sizes(name: str, large: int, small: int) -> dict[int, Replay]:
        found = {large: replay(compiled[name])}
        if small < large:
            on_program(f"{name} of {small:,} {'slots' if name == programs.DECODE else 'tokens per row'}")
            found[small] = replay(compile_program(make_program(name, config, architecture, meshes, small)))
        return found

    def rows(name: str) -> dict[int, StepTime]:
        tokens = compiled[name].program.tokens // shards
        return {size: replayed.step() for size, replayed in sizes(name, tokens, ROW_TOKENS).items()}

    slots, few = config.decode.slots, few_slots(config, meshes.decode)
    steps = config.decode.steps_per_call
    return StepTimes(
        block=block,
        decode={
            size: [replayed.step(count, block, steps) for count in positions]
            for size, replayed in sizes(programs.DECODE, slots, few).items()
        },
        prefill=rows(programs.PREFILL),
        score=rows(programs.SCORE),
        train=replay(compiled[programs.TRAIN]).step(),
    )


def plan_throughput(plan: Plan, shape: Shape) -> Throughput:
    """Returns the requests of a shape per second, on a chip with known peaks."""
    tokens = plan.programs[programs.PREFILL].compiled.program.tokens
    return throughput(shape, plan.config, tokens, _bounds(plan), _supposed(plan), plan.times)


def _supposed(plan: Plan) -> SupposedModel:
    decode, shape = plan.config.decode, decode_shape(plan.config, plan.architecture, plan.meshes)
    sizing, block, is_alone = Sizing.of(shape.mesh), shape.read_block, shape.reads_sequences_alone
    if not plan.hardware.is_here:  # a GPU, for which another device stands in
        sizing, tile, is_int8 = Sizing("gpu", 1), cache_block("gpu"), decode.kv_cache_dtype == "int8"
        is_alone = kernel_refusal(plan.architecture.head_dim, tile, is_int8, LEAST_CAPABILITY) is None
        block = KERNEL_BLOCK if is_alone else tile
    return SupposedModel(
        sizing, decode.max_length, decode.slots, decode.steps_per_call, step_bytes(shape), block, is_alone
    )


def _hosts(plan: Plan) -> Hosts:
    hardware, architecture = plan.hardware, plan.architecture
    train, decode = plan.meshes.train, plan.meshes.decode
    return Hosts(
        count=hardware.hosts,
        devices=len(hardware.devices) // hardware.hosts,
        model_bytes=parameter_count(architecture) * 2.0,
        adapter_bytes=adapter_bytes(architecture, plan.config.sft),
        memory=KEPT_SHARE * hardware.host_memory,
        one_layout=train == decode,
    )


def _bounds(plan: Plan) -> Bounds:
    decode = plan.programs[programs.DECODE].compiled.program

    def decode_bound(positions: float) -> float:
        return bound(_cost(decode, plan, positions), plan.hardware.chip).seconds

    return Bounds({name: p.bound for name, p in plan.programs.items()}, decode_bound)


def _cost(program: Program, plan: Plan, positions: float) -> Cost:
    """Returns the cost of a decode step that reads so many cache positions of each slot."""
    arguments = program, plan.config, plan.architecture
    return Cost(
        flops=program_flops(*arguments, positions) / plan.meshes.train.size,
        hbm_bytes=program_hbm_bytes(*arguments, plan.meshes, positions),
        interconnect_bytes=plan.programs[program.name].cost.interconnect_bytes,
    )


def plan_program(
    compiled: Compiled, config: Config, architecture: Architecture, meshes: Meshes, hardware: Hardware
) -> ProgramPlan:
    """Compares the needs of a compiled program with the hardware.

    Args:
        compiled: the program.
        config: the settings that it was compiled for.
        architecture: the model's.
        meshes: those of the config on the hardware.
        hardware: its chip and the memory of a chip.
    """
    program = compiled.program
    cost = Cost(
        flops=program_flops(program, config, architecture) / meshes.train.size,
        hbm_bytes=program_hbm_bytes(program, config, architecture, meshes),
        interconnect_bytes=sum(c.wire_bytes for c in compiled.collectives),
    )
    fits = compiled.fits(hardware.hbm)
    return ProgramPlan(
        compiled,
        cost,
        bound(cost, hardware.chip) if hardware.chip else None,
        fits,
        "" if fits else advice(compiled, config, architecture, meshes),
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON, in bytes, seconds and counts, and in GiB where a key says so."""
    hardware, chips = plan.hardware, len(plan.hardware.devices)
    result: dict[str, Any] = {
        "config": plan.config.name,
        "model": plan.config.model.path,
        "parameters": parameter_count(plan.architecture),
        "hardware": hardware.name,
        "chips": chips,
        "hbm_gib": hardware.hbm / GIB,
        "headroom": HEADROOM,
        "mesh": dict(plan.meshes.train.shape),
        "decode_mesh": dict(plan.meshes.decode.shape),
        "settings": {name: value for name, value in flatten(plan.config).items() if name.startswith(_SETTINGS)},
        "fits": plan.fits,
        "smallest_matrix_bytes": _smallest_matrix(plan),
        "programs": {name: _program_dict(p) for name, p in plan.programs.items()},
    }
    if plan.times:
        result["forecast_seconds_per_step"] = _times_dict(plan.times)
    if hardware.chip and len(plan.programs) == len(programs.NAMES):
        result["iteration"] = iteration.as_dict(plan.iteration, chips)
    return result


def _times_dict(times: StepTimes) -> dict[str, Any]:
    """Returns forecast times as JSON: decoding by slots and blocks of cache positions, rows by their tokens."""

    def parts(time: StepTime) -> dict[str, float]:
        return {"seconds": time.seconds, **dataclasses.asdict(time)}

    return {
        "cache_block": times.block,
        programs.DECODE: {slots: [parts(time) for time in blocks] for slots, blocks in times.decode.items()},
        programs.PREFILL: {tokens: parts(time) for tokens, time in times.prefill.items()},
        programs.SCORE: {tokens: parts(time) for tokens, time in times.score.items()},
        programs.TRAIN: parts(times.train),
    }


def _largest(compiled: Compiled) -> dict[str, dict[str, Any]]:
    """Returns for each kind the collective that moves the largest array at once."""
    largest: dict[str, Collective] = {}
    for collective in compiled.collectives:
        if collective.kind not in largest or collective.size > largest[collective.kind].size:
            largest[collective.kind] = collective
    return {kind: {"bytes": c.size, "shape": c.shape, "op": c.op} for kind, c in largest.items()}


def _smallest_matrix(plan: Plan) -> float:
    """Returns the bytes of a layer's smallest weight matrix on one chip while decoding."""
    int8 = plan.config.decode.weights_dtype == "int8"
    itemsize = 1 if int8 else jnp.dtype(plan.config.model.compute_dtype).itemsize
    layers = parameter_table(plan.architecture)["layers"].values()
    sizes = [math.prod(s.shape[1:]) for s in layers if s.is_matrix]
    return min(sizes) * itemsize / plan.meshes.decode.shape["tensor"]


def _program_dict(p: ProgramPlan) -> dict[str, Any]:
    compiled = p.compiled
    memory = {field: value / GIB for field, value in dataclasses.asdict(compiled.memory).items()}
    return {
        "compile_seconds": round(compiled.seconds, 1),
        "rows": compiled.program.rows,
        "tokens": compiled.program.tokens,
        "gib_per_chip": {**memory, "total": compiled.memory.total / GIB},
        "fits": p.fits,
        "error": compiled.error,
        "advice": p.advice,
        "collectives_per_step": by_kind(compiled.collectives),
        "largest_collectives": _largest(compiled),
        "cost_per_chip_and_step": dataclasses.asdict(p.cost),
        "least_seconds_per_step": dataclasses.asdict(p.bound) if p.bound else None,
    }
