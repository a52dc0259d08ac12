"""Reads the text of a compiled module (`compiled.as_text()`): computations, instructions, calls and trip counts."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|called_computations|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    type: HLO type of the result. root: whether it is the computation's result.
    """

    name: str
    type: str
    opcode: str
    line: str
    root: bool

    @property
    def op(self) -> str:
        """Name of the operation in the traced program, or ""."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        arguments = self.line.partition(f" {self.opcode}(")[2].partition(")")[0]
        return re.findall(r"%([\w.\-]+)", arguments)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls: body, branches, fused computation."""
        return [
            name.strip().lstrip("%") for group in _CALLED.findall(self.line) for name in group.strip("{}").split(",")
        ]

    @property
    def dimensions(self) -> list[tuple[int, ...]]:
        """Dimensions of each array of its type."""
        return [_sizes(dimensions) for _, dimensions in _ARRAY.findall(self.type)]


class Module:
    """A compiled module.

    computations: the instructions of each computation, in the order in which they run.
    entry: name of the computation that the program is.
    """

    def __init__(self, text: str):
        """Parses the text of a module."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(Instruction(match[2], match[3], match[4], line, bool(match[1])))

    def find(self, computation: str, name: str) -> Instruction | None:
        """Returns an instruction of a computation by its name."""
        return self._by_name.get((computation, name))

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Instruction]:
        return {(name, i.name): i for name, instructions in self.computations.items() for i in instructions}

    def inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """Yields the instructions of a computation and of all that it calls, with the name of their computation."""
        for instruction in self.computations.get(name, ()):
            yield name, instruction
            for called in instruction.called:
                yield from self.inside(called)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns the trip count of a while loop, or None if data decide it. JAX's counted loops count up from 0."""
        known = re.search(r'known_trip_count"?:\s*\{"n":"?(\d+)', loop.line)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
        body = re.search(r"body=%?([\w.\-]+)", loop.line)
        instructions = self.computations.get(condition[1], []) if condition else []
        root = next((i for i in instructions if i.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.line:
            return None
        constants = _constants(instructions)
        limit = next((constants[name] for name in root.operands if name in constants), None)
        if limit is None:
            return None
        counter = next((self.find(condition[1], name) for name in root.operands if name not in constants), None)
        return math.ceil(limit / (self._increment(body[1], counter) if body else 1))

    def _increment(self, body: str, counter: Instruction | None) -> int:
        """Returns by how much a loop's body raises its counter: 2 where the compiler has unrolled a loop once."""
        index = re.search(r"index=(\d+)", counter.line) if counter else None
        instructions = self.computations.get(body, [])
        root = next((i for i in instructions if i.root), None)
        if index is None or root is None or root.opcode != "tuple" or int(index[1]) >= len(root.operands):
            return 1
        constants = _constants(instructions)
        total, value = 0, self.find(body, root.operands[int(index[1])])
        while value is not None and value.opcode == "add":
            steps = [constants[name] for name in value.operands if name in constants]
            if len(steps) != 1:
                return 1
            total += steps[0]
            value = next((self.find(body, name) for name in value.operands if name not in constants), None)
        return max(total, 1)


def array_bytes(type_text: str) -> list[int]:
    """Returns the bytes of each array in an HLO type such as "(bf16[16,8]{1,0}, s32[])"; tokens have none."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(type_text):
        width = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn, s32, u4
        bits = _BITS.get(dtype) or (int(width[1]) if width else 0)
        sizes.append(math.ceil(math.prod(_sizes(dimensions)) * bits / 8))
    return sizes


def _sizes(dimensions: str) -> tuple[int, ...]:
    return tuple(int(d) for d in dimensions.split(",") if d)


def _constants(instructions: list[Instruction]) -> dict[str, int]:
    """Returns the integers among a computation's constants."""
    return {i.name: int(m[1]) for i in instructions if (m := re.search(r" constant\((-?\d+)\)", i.line)) is not None}
