"""Finds the collectives of a compiled program, and the bytes that they send, in the text of its module.

The text names each collective once, however often it runs, so a collective in a loop is multiplied by the loop's trip
count. A loop whose end depends on data counts once: the figures of a decode call are those of one decode step.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation|called_computations|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    kind: one of `KINDS`.
    size: bytes of the whole array that is gathered, reduced or moved, on one device.
    group: number of devices that take part.
    count: runs per step.
    shape: HLO type of the result.
    op: name of the operation in the traced program.
    """

    kind: str
    size: int
    group: int
    count: int
    shape: str
    op: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends per step with the best ring algorithm (Patarasuk and Yuan 2009)."""
        share = 1.0 if self.kind in ("collective-permute", "collective-broadcast") else (self.group - 1) / self.group
        return self.count * self.size * share * (2 if self.kind == "all-reduce" else 1)


@dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    line: str
    root: bool


@dataclass
class _Computation:
    instructions: list[_Instruction] = field(default_factory=list)


def collectives(module_text: str) -> list[Collective]:
    """Returns the collectives of a compiled module (`compiled.as_text()`), most bytes first."""
    computations, entry = _parse(module_text)
    by_channel: dict[tuple[str, str], Collective] = {}
    for name, instruction, times in _walk(computations, entry, 1):
        collective = _collective(name, instruction, times)
        if collective is None or collective.group < 2:
            continue
        # The TPU compiler splits an asynchronous collective into pieces that share its channel. Some pieces run inside
        # the body of a loop; the collective itself runs as often as its least frequent piece.
        channel = re.search(r"channel_id=(\d+)", instruction.line)
        key = collective.kind, channel[1] if channel else f"{name}/{instruction.name}"
        if key not in by_channel or by_channel[key].count > collective.count:
            by_channel[key] = collective
    return sorted(by_channel.values(), key=lambda c: -c.wire_bytes)


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns {kind: {"count": per step, "wire_bytes": per device and step}}."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "wire_bytes": 0.0})
    for collective in collectives:
        table[collective.kind]["count"] += collective.count
        table[collective.kind]["wire_bytes"] += collective.wire_bytes
    return dict(sorted(table.items(), key=lambda item: -item[1]["wire_bytes"]))


def array_bytes(type_text: str) -> list[int]:
    """Returns the bytes of each array in an HLO type such as "(bf16[16,8]{1,0}, s32[])"; tokens have none."""
    sizes = []
    for dtype, dimensions in _ARRAY.findall(type_text):
        width = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn, s32, u4
        bits = _BITS.get(dtype) or (int(width[1]) if width else 0)
        sizes.append(math.ceil(math.prod(int(d) for d in dimensions.split(",") if d) * bits / 8))
    return sizes


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = _Computation()
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.instructions.append(_Instruction(match[2], match[3], match[4], line, bool(match[1])))
    return computations, entry


def _walk(computations: dict[str, _Computation], name: str, times: int) -> Iterator[tuple[str, _Instruction, int]]:
    """Yields every instruction that the computation runs: (name of its computation, instruction, number of runs)."""
    for instruction in computations[name].instructions if name in computations else ():
        yield name, instruction, times
        inner = times
        if instruction.opcode == "while":
            inner *= trip_count(computations, instruction.line) or 1
        for called in _called(instruction):
            # All branches of a conditional are counted, because the data decide which one runs.
            yield from _walk(computations, called, inner)


def _called(instruction: _Instruction) -> list[str]:
    if instruction.opcode in KINDS or instruction.opcode.removesuffix("-start") in KINDS:
        return []  # to_apply of a reduction: the scalar addition
    names = []
    for group in _CALLED.findall(instruction.line):
        names += [name.strip().lstrip("%") for name in group.strip("{}").split(",")]
    return names


def trip_count(computations: dict[str, _Computation], line: str) -> int | None:
    """Returns the trip count of a while loop, or None if data decide it. JAX's counted loops count up from 0."""
    known = re.search(r'known_trip_count"?:\s*\{"n":"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    if not condition or condition[1] not in computations:
        return None
    instructions = computations[condition[1]].instructions
    constants = {
        i.name: int(m[1]) for i in instructions if (m := re.search(r" constant\((-?\d+)\)", i.line)) is not None
    }
    root = next((i for i in instructions if i.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.line:
        return None
    operands = re.findall(r"%([\w.\-]+)", root.line.partition(" compare(")[2].partition(")")[0])
    return next((constants[name] for name in operands if name in constants), None)


def _collective(computation: str, instruction: _Instruction, times: int) -> Collective | None:
    opcode = instruction.opcode
    started = opcode.endswith("-start")
    kind = opcode.removesuffix("-start")
    if kind == "ragged-all-to-all":
        kind = "all-to-all"
    if kind not in KINDS:
        return None
    sizes = array_bytes(instruction.type)
    group = _group_size(instruction.line)
    if started and kind in ("all-gather", "reduce-scatter", "collective-permute", "all-to-all"):
        # The type is (operands, results, flags); the larger of operand and result is the whole array.
        size = max(sizes)
    elif kind == "reduce-scatter":
        size = sum(sizes) * group
    else:
        size = sum(sizes)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # on TPU, an all-reduce fused with the slice that is kept
    op = re.search(r'op_name="([^"]*)"', instruction.line)
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.type)
    return Collective(kind, size, group, times, shape, op[1] if op else "")


def _group_size(line: str) -> int:
    """Returns the number of devices that exchange data: replica_groups in any of HLO's three notations."""
    if "source_target_pairs=" in line:
        return max(2, len(re.findall(r"\{\d+,\d+\}", line)))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))? ?\{([^}]*)\}", line)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", axes[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    lists = re.search(r"replica_groups=\{\{([^}]*)\}", line)
    return len(lists[1].split(",")) if lists else 2
