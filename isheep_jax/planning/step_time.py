"""Forecasts the time of a program's step on a TPU by replaying the schedule that the compiler wrote.

The compiler's text says in which order a chip runs the instructions, and its own estimate of the cycles of each. Three
kinds carry no estimate and get a time here: collectives (the links that they have, see `torus`), scatters, and kernels
written in Pallas. What runs after one another is added. Asynchronous collectives and copies from HBM run beside what
stands between their start and their end, and cost what is left of them there.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from isheep_jax.model.attention_cached import DECODE_KERNEL
from isheep_jax.planning.collectives import Collective, as_collective, channel_of
from isheep_jax.planning.hardware import Chip
from isheep_jax.planning.module import Instruction, Module, array_bytes
from isheep_jax.planning.torus import Torus

# Seconds per row that a scatter writes. Writing the keys and values of a prompt of 1,024 tokens by page in place of by
# token took 45 ms less (vllm-project/vllm#13176: 82 to 37 ms); for 32 layers of two arrays that is 0.7 us a row.
SCATTER_ROW = 0.7e-6
# Shares of a chip's peak arithmetic that the Pallas kernels of training and prefill reach, and of its bandwidth that
# the kernel of decode steps reaches (one of this kind: up to 86 %, arXiv 2604.15464).
KERNEL_SHARE, READ_SHARE = 0.4, 0.7
# Draws until each row of a batch has a token above the floor of top-p.
SAMPLING_TRIES = 6

# What this module assumes, as lines for the reader of a plan.
ASSUMPTIONS = (
    f"a scatter takes {SCATTER_ROW * 1e6:.1f} us per row of keys or values (from vllm-project/vllm#13176)",
    f"Pallas kernels reach {KERNEL_SHARE:.0%} of the peak, that of decode steps {READ_SHARE:.0%} of the bandwidth (a "
    "similar one is reported to reach up to 86 %: arXiv 2604.15464)",
    f"top-p takes {SAMPLING_TRIES} draws per step",
    "collectives have the links of their mesh axis on the torus, and a microsecond per hop",
)

# What the compiler writes for a fusion that it cannot estimate.
_NO_ESTIMATE = 2**63 - 1

# Turns of the loops whose end depends on data, by the end of their operation's name: those over blocks of cache
# positions, over the steps of a call, and over draws, of which those of top-k are left out: the loop does not use it.
_BLOCKS, _STEPS = "attention/while", "(decode_steps)/while"
# Beside them, what the kernel of decode steps reads; no operation ends so.
_POSITIONS = "cache positions"
_TOP_K, _TOP_P = re.compile(r"/cond/.*/cond/.*while$"), re.compile(r"/cond/.*while$")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on a chip, by what takes them; their sum is its duration.

    compute: instructions with an estimate.
    collectives: those that nothing runs beside, and what is left of others.
    scatters: writing rows of keys and values outside of kernels.
    kernels: Pallas kernels, and products that the compiler could not estimate.
    copies: what is left of asynchronous copies between HBM and the chip's own memory.
    host: waits of the devices for the host, and for kernels that have yet to start.
    """

    compute: float = 0.0
    collectives: float = 0.0
    scatters: float = 0.0
    kernels: float = 0.0
    copies: float = 0.0
    host: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self)

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(*(a + b for a, b in zip(self, other)))

    def __mul__(self, times: float) -> "StepTime":
        return StepTime(*(times * a for a in self))


class Replay:
    """The schedule of a compiled module, to be replayed."""

    def __init__(self, module: Module, chip: Chip, torus: Torus):
        """Prepares the replay.

        Args:
            module: of a program that is compiled for TPUs.
            chip: its figures.
            torus: of the program's mesh.
        """
        self._module, self._chip, self._torus = module, chip, torus
        self._known: dict[tuple, StepTime] = {}

    def step(self, positions: int = 1, block: int = 1, steps: int = 1) -> StepTime:
        """Returns the time of a step.

        Args:
            positions: of the cache that each layer reads of every row.
            block: those that are read at a time.
            steps: of one call of a decode program, which share the time of its beginning and end.
        """
        trips = {_BLOCKS: math.ceil(positions / block), _STEPS: steps, _POSITIONS: positions}
        return self._computation(self._module.entry, trips) * (1 / steps)

    def _computation(self, name: str, trips: Mapping[str, int]) -> StepTime:
        key = (name, *trips.values())
        if key not in self._known:
            self._known[key] = self._replay(name, trips)
        return self._known[key]

    def _replay(self, name: str, trips: Mapping[str, int]) -> StepTime:
        total = StepTime()
        ends: dict[str, float] = {}  # of what has started, by name or channel
        free: dict[object, float] = {}  # when the links of a group, or the HBM, have done what was started before

        def start(key: str, resource: object, seconds: float) -> None:
            begin = max(total.seconds, free.get(resource, 0.0))
            ends[key] = free[resource] = begin + seconds

        def rest(key: str) -> float:
            return max(0.0, ends.pop(key, 0.0) - total.seconds)

        for instruction in self._module.computations.get(name, ()):
            opcode = instruction.opcode
            if opcode in ("while", "conditional", "call"):
                total += self._control(instruction, trips)
                continue
            inside = self._collectives(name, instruction)
            target = _async_target(self._module, instruction)
            if opcode in ("copy-start", "slice-start"):
                # The type has the array that is read and the part of it that is copied.
                copied = min(array_bytes(instruction.type)[:2])
                start(instruction.name, "hbm", copied / self._chip.hbm_bandwidth)
            elif opcode in ("copy-done", "slice-done"):
                total += StepTime(copies=rest(instruction.operands[0]))
            elif target == "AsyncCollectiveStart" or (inside and opcode.endswith("-start")):
                for channel, collective in inside:
                    key = channel if target else instruction.name
                    start(key, collective.groups, self._torus.seconds(collective))
            elif target == "AsyncCollectiveDone":
                total += StepTime(collectives=sum(rest(channel) for channel, _ in inside))
            elif opcode.endswith("-done"):
                total += StepTime(collectives=rest(instruction.operands[0]))
            else:
                # A fusion with a piece of a collective that has started runs beside it.
                waits = sum(self._torus.seconds(c) for channel, c in inside if channel not in ends)
                total += StepTime(
                    compute=_cycles(instruction) / self._chip.clock,
                    collectives=waits,
                    scatters=SCATTER_ROW * self._scattered_rows(name, instruction),
                    kernels=self._kernel_seconds(instruction, trips),
                )
        return total

    def _control(self, instruction: Instruction, trips: Mapping[str, int]) -> StepTime:
        """Returns the time of a loop, of the slowest branch of a conditional, or of a call."""
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.line)[1]
            return self._computation(body, trips) * self._turns(instruction, trips)
        called = [self._computation(name, trips) for name in instruction.called]
        return max(called, key=lambda time: time.seconds, default=StepTime())

    def _turns(self, loop: Instruction, trips: Mapping[str, int]) -> int:
        known = self._module.trip_count(loop)
        if known is not None:
            return known
        if _TOP_K.search(loop.op):
            return 0
        if _TOP_P.search(loop.op):
            return SAMPLING_TRIES
        return next((count for end, count in trips.items() if loop.op.endswith(end)), 1)

    def _collectives(self, computation: str, instruction: Instruction) -> list[tuple[str, Collective]]:
        """Returns the collectives that an instruction is or that are fused into it, with their channels."""
        own = as_collective(computation, instruction)
        found = [(instruction, own)] if own else []
        if not own:
            for called in instruction.called:
                found += [(i, as_collective(name, i)) for name, i in self._module.inside(called)]
        return [(channel_of(i) or i.name, c) for i, c in found if c is not None and c.group > 1]

    def _kernel_seconds(self, instruction: Instruction, trips: Mapping[str, int]) -> float:
        if _is_kernel(instruction) and DECODE_KERNEL in instruction.name:
            return _read_bytes(instruction, trips[_POSITIONS]) / (READ_SHARE * self._chip.hbm_bandwidth)
        return self._unestimated_flops(instruction) / (KERNEL_SHARE * self._chip.flops)

    def _unestimated_flops(self, instruction: Instruction) -> float:
        """Returns the operations of a Pallas kernel, or of the products in a fusion without an estimate."""
        if f'"{_NO_ESTIMATE}"' not in instruction.line:
            return _kernel_flops(instruction)
        inside = (pair for called in instruction.called for pair in self._module.inside(called))
        return sum(_product_flops(self._module, n, i) for n, i in inside if i.opcode in ("convolution", "dot"))

    def _scattered_rows(self, computation: str, instruction: Instruction) -> int:
        """Returns the rows that a scatter, alone or fused, writes."""
        found = [(computation, instruction)] if instruction.opcode == "scatter" else []
        for called in instruction.called if instruction.opcode == "fusion" else ():
            found += [(name, i) for name, i in self._module.inside(called) if i.opcode == "scatter"]
        rows = 0
        for name, scatter in found:
            indices = self._module.find(name, scatter.operands[len(scatter.operands) // 2])
            vector = re.search(r"index_vector_dim=(\d+)", scatter.line)
            sizes = indices.dimensions[0] if indices else ()
            # One dimension holds the coordinates of a row.
            rows += math.prod(n for d, n in enumerate(sizes) if not vector or d != int(vector[1]))
        return rows


def _product_flops(module: Module, computation: str, product: Instruction) -> float:
    """Returns the operations of the product of an [M, K] and a [K, N] matrix: 2 sqrt(MK x KN x MN)."""
    operands = [module.find(computation, name) for name in product.operands[:2]]
    sizes = [math.prod(i.dimensions[0]) for i in (product, *operands) if i is not None and i.dimensions]
    return 2.0 * math.sqrt(math.prod(sizes)) if len(sizes) == 3 else 0.0


def _cycles(instruction: Instruction) -> int:
    """Returns the compiler's estimate of an instruction, 0 if it has none."""
    found = re.search(r'estimated_cycles":"(\d+)"', instruction.line)
    return int(found[1]) if found and int(found[1]) != _NO_ESTIMATE else 0


def _async_target(module: Module, instruction: Instruction) -> str:
    """Returns whether a fusion starts or ends an asynchronous collective: the target of the custom call in it."""
    if instruction.opcode != "fusion" or "kind=kCustom" not in instruction.line:
        return ""
    for called in instruction.called:
        for inner in module.computations.get(called, ()):
            found = re.search(r'custom_call_target="(AsyncCollective\w+)"', inner.line)
            if found:
                return found[1]
    return ""


def _is_kernel(instruction: Instruction) -> bool:
    """Returns whether an instruction is a Pallas kernel."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.line


def _kernel_operands(instruction: Instruction) -> list[tuple[str, list[int]]]:
    """Returns the dtypes and sizes of a kernel's operands that are floats."""
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}(?:, \w+=|$)", instruction.line)
    found = re.findall(r"(bf16|f16|f32)\[([\d,]+)\]", operands[1]) if operands else []
    return [(dtype, [int(size) for size in sizes.split(",")]) for dtype, sizes in found]


def _read_bytes(kernel: Instruction, positions: int) -> float:
    """Returns the bytes of keys and values that the kernel of decode steps reads of so many positions of every row."""
    dtype, (_, rows, _, width) = _kernel_operands(kernel)[-1]
    return 2.0 * positions * sum(array_bytes(f"{dtype}[{rows},{width}]"))


def _kernel_flops(instruction: Instruction) -> float:
    """Returns the operations of a Pallas kernel of causal attention, from the shapes of its queries and keys."""
    operands = _kernel_operands(instruction) if _is_kernel(instruction) else []
    if len(operands) < 2:
        return 0.0
    (_, q), (_, k) = operands[:2]
    products = 5 if "dkv" in instruction.name or "dq" in instruction.name else 2
    # Half of the keys are later than the query.
    return products * 2.0 * math.prod(q) * k[-2] / 2
