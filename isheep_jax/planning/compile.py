"""Compiles a program and reads from the executable what it needs: memory by its use, and what it sends."""

import re
import time
from dataclasses import dataclass, field

from isheep_jax.config import Config
from isheep_jax.model.architecture import Architecture
from isheep_jax.planning import programs
from isheep_jax.planning.collectives import Collective, collectives
from isheep_jax.planning.hardware import GIB
from isheep_jax.planning.programs import Meshes, Program

# The runtime keeps something for itself, and memory breaks into pieces.
HEADROOM = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs.

    temporaries: intermediate results, and outputs that take no argument's place. other: batches, and what the layout
    adds to the arguments.
    """

    weights: float
    optimizer: float
    cache: float
    temporaries: float
    other: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.cache + self.temporaries + self.other


@dataclass(frozen=True)
class Compiled:
    """A program's compilation. error: why there is no executable (the temporaries are then what the compiler names)."""

    program: Program
    seconds: float
    memory: Memory
    collectives: list[Collective] = field(default_factory=list)
    text: str = ""
    error: str = ""

    def fits(self, hbm: float) -> bool:
        """Whether it leaves `HEADROOM` of the memory free."""
        return not self.error and self.memory.total <= (1 - HEADROOM) * hbm


def compile_program(program: Program) -> Compiled:
    """Compiles without running. A program whose temporaries alone do not fit is a result with `error`, not an error."""
    import jax

    start = time.monotonic()
    try:
        compiled = program.compile() if program.compile else program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        needed = re.search(r"\(([\d.]+)([KMG])\)", message)
        size = float(needed[1]) * {"K": 2**10, "M": 2**20, "G": GIB}[needed[2]] if needed else float("inf")
        memory = Memory(program.weights, program.optimizer, program.cache, size, 0.0)
        return Compiled(program, time.monotonic() - start, memory, error=message[:300])
    seconds = time.monotonic() - start
    text = compiled.as_text()
    memory = memory_split(program, compiled.memory_analysis())
    return Compiled(program, seconds, memory, collectives(text), text)


def memory_split(program: Program, analysis) -> Memory:
    """The executable's memory by its use: arguments + outputs + temporaries - what outputs take over from arguments."""
    named = program.weights + program.optimizer + program.cache
    return Memory(
        weights=program.weights,
        optimizer=program.optimizer,
        cache=program.cache,
        temporaries=analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        # An argument that the program does not use (the output head in prefill) stays in memory all the same.
        other=max(0.0, analysis.argument_size_in_bytes - named),
    )


def advice(compiled: Compiled, config: Config, architecture: Architecture, meshes: Meshes) -> str:
    """The setting to change when a program does not fit, by what takes the most."""
    name, memory = compiled.program.name, compiled.memory
    decode, sft = config.decode, config.sft
    if name == programs.TRAIN:
        if memory.weights + memory.optimizer > memory.temporaries:
            if sft.method == "full":
                return "--sft.method=lora, or a larger slice (--mesh.topology)"
            return "a larger slice (--mesh.topology), or --mesh.tensor if weights are repeated over mesh.data"
        if sft.remat == "none":
            return "--sft.remat=full"
        rows = meshes.train.shape["data"] * meshes.train.shape["fsdp"]
        if sft.batch_size > rows:
            return f"--sft.batch_size={rows}"
        return f"--sft.sequence_length={sft.sequence_length // 2}, or a larger --mesh.tensor"
    larger = meshes.decode.shape["tensor"] * 2
    if memory.weights > max(memory.cache, memory.temporaries):
        if architecture.kv_heads % larger == 0:
            return f"--mesh.decode_tensor={larger}"
        return "a chip with more memory (--mesh.topology)"
    shards = meshes.decode.shape["data"]
    if memory.cache > memory.temporaries and decode.slots > shards:
        return f"--decode.slots={max(shards, decode.slots // 2)}"
    return f"--decode.max_length={decode.max_length // 2}"
