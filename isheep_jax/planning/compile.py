"""Compiles a program without running it, and reads its memory and collectives from the executable."""

import re
import time
from dataclasses import dataclass, field

from isheep_jax.config import Config
from isheep_jax.model.architecture import Architecture
from isheep_jax.planning import programs
from isheep_jax.planning.collectives import Collective, collectives
from isheep_jax.planning.hardware import GIB
from isheep_jax.planning.module import Module
from isheep_jax.planning.programs import Meshes, Program

# Share of the memory that must stay free, for the runtime itself and for fragmentation.
HEADROOM = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs.

    temporaries: intermediate results, and outputs that do not reuse the memory of an argument.
    other: batches, and padding that layouts add to the arguments.
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
    """The result of compiling a program.

    error: why there is no executable, or ""; the temporaries are then the figure in the compiler's message.
    """

    program: Program
    seconds: float
    memory: Memory
    collectives: list[Collective] = field(default_factory=list)
    module: Module | None = None
    error: str = ""

    def fits(self, hbm: float) -> bool:
        """Returns whether `HEADROOM` of the memory stays free."""
        return not self.error and self.memory.total <= (1 - HEADROOM) * hbm


def compile_program(program: Program) -> Compiled:
    """Compiles a program. If its temporaries do not fit, the result has an `error`; nothing is raised."""
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
    module = Module(compiled.as_text())
    memory = memory_split(program, compiled.memory_analysis())
    return Compiled(program, seconds, memory, collectives(module), module)


def uncompiled(program: Program) -> Compiled:
    """Returns a program with the memory of its arguments alone."""
    return Compiled(program, 0.0, Memory(program.weights, program.optimizer, program.cache, 0.0, 0.0))


def memory_split(program: Program, analysis) -> Memory:
    """Splits the memory of an executable: arguments + outputs + temporaries - outputs that reuse arguments."""
    named = program.weights + program.optimizer + program.cache
    return Memory(
        weights=program.weights,
        optimizer=program.optimizer,
        cache=program.cache,
        temporaries=analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        # An argument that the program does not use (the lm_head in prefill) still takes memory.
        other=max(0.0, analysis.argument_size_in_bytes - named),
    )


def advice(compiled: Compiled, config: Config, architecture: Architecture, meshes: Meshes) -> str:
    """Returns the setting to change when a program does not fit, chosen by what takes the most memory.

    Args:
        compiled: the program.
        config: the settings that it was compiled for.
        architecture: the model's.
        meshes: those of the config.
    """
    name, memory = compiled.program.name, compiled.memory
    decode, sft = config.decode, config.sft
    if name == programs.TRAIN:
        data, slices = meshes.train.shape["data"], config.mesh.slices
        rows = data * meshes.train.shape["fsdp"]
        if memory.weights + memory.optimizer > memory.temporaries:
            if data > slices:  # every one of these has a copy
                return f"--mesh.data={slices} --mesh.fsdp={rows // slices}"
            if sft.method == "full":
                return "--sft.method=lora, or a larger slice (--mesh.topology)"
            return "a larger slice (--mesh.topology)"
        if sft.remat != "full":
            return "--sft.remat=full" if sft.remat == "selective" else "--sft.remat=selective"
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
