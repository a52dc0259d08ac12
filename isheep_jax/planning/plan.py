"""Makes the plan of a config: compiles its programs for its hardware and says what they need and whether they fit."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.config import Config, flatten
from isheep_jax.decode.capacity import local_memory
from isheep_jax.decode.programs import clear_programs
from isheep_jax.model.architecture import Architecture, parameter_count, parameter_table
from isheep_jax.planning import iteration, programs
from isheep_jax.planning.collectives import Collective, by_kind
from isheep_jax.planning.compile import HEADROOM, Compiled, advice, compile_program
from isheep_jax.planning.cost import Bound, Cost, bound, program_flops, program_hbm_bytes
from isheep_jax.planning.hardware import GIB, Chip, local_chip, parse_topology, slice_devices
from isheep_jax.planning.programs import Meshes, make_meshes, make_program

# Prefixes of the settings that decide what the programs need; the written plan has these settings.
_SETTINGS = ("mesh.", "decode.", "sft.method", "sft.lora_rank", "sft.sequence_length", "sft.batch_size", "sft.remat")


@dataclass(frozen=True)
class Hardware:
    """The devices that a config is compiled for. chip: None without public figures (a CPU)."""

    name: str
    devices: list[Any]
    chip: Chip | None
    hbm: float


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
    """All programs of a config on its hardware."""

    config: Config
    architecture: Architecture
    hardware: Hardware
    meshes: Meshes
    programs: dict[str, ProgramPlan]

    @property
    def fits(self) -> bool:
        return all(p.fits for p in self.programs.values())


def find_hardware(config: Config) -> Hardware:
    """Returns the slices of `mesh.topology`, or the devices of this machine."""
    if config.mesh.topology:
        tpu_slice = parse_topology(config.mesh.topology)
        devices = slice_devices(config.mesh.topology, config.mesh.slices)
        chips = f"{len(devices)} {tpu_slice.chip.name} chip{'s' if len(devices) > 1 else ''}"
        slices = f"{config.mesh.slices} x " if config.mesh.slices > 1 else ""
        return Hardware(f"{slices}{config.mesh.topology}: {chips}", devices, tpu_slice.chip, tpu_slice.chip.hbm)
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
        compiled = compile_program(make_program(name, config, architecture, meshes))
        plans[name] = plan_program(compiled, config, architecture, meshes, hardware)
    return Plan(config, architecture, hardware, meshes, plans)


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
    if hardware.chip and len(plan.programs) == len(programs.NAMES):
        by_name = {name: p.compiled.program for name, p in plan.programs.items()}
        bounds = {name: p.bound for name, p in plan.programs.items()}
        result["iteration"] = iteration.as_dict(iteration.plan_iteration(plan.config, by_name, bounds), chips)
    return result


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
