"""Finds the collectives of a compiled program, and the bytes that they send, in its module.

The text names each collective once, however often it runs, so a collective in a loop is multiplied by the loop's trip
count. A loop whose end depends on data counts once: the figures of a decode call are those of one decode step.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from isheep_jax.planning.module import Instruction, Module, array_bytes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")

# Devices that exchange data, by their index in the program's mesh.
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    kind: one of `KINDS`.
    size: bytes of the whole array that is gathered, reduced or moved, on one device.
    group: number of devices that take part.
    count: runs per step.
    shape: HLO type of the result.
    op: name of the operation in the traced program.
    groups: the devices of each group; of a permute its (source, target) pairs; () means all devices.
    """

    kind: str
    size: int
    group: int
    count: int
    shape: str
    op: str
    groups: Groups = ()

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends per step with the best ring algorithm (Patarasuk and Yuan 2009)."""
        share = 1.0 if self.kind in ("collective-permute", "collective-broadcast") else (self.group - 1) / self.group
        return self.count * self.size * share * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module) -> list[Collective]:
    """Returns the collectives of a compiled module, most bytes first."""
    by_channel: dict[tuple[str, str], Collective] = {}
    for name, instruction, times in _walk(module, module.entry, 1):
        collective = as_collective(name, instruction)
        if collective is None or collective.group < 2:
            continue
        # The TPU compiler splits an asynchronous collective into pieces that share its channel. Some pieces run inside
        # the body of a loop; the collective itself runs as often as its least frequent piece.
        key = collective.kind, channel_of(instruction) or f"{name}/{instruction.name}"
        if key not in by_channel or by_channel[key].count > times:
            by_channel[key] = dataclasses.replace(collective, count=times)
    return sorted(by_channel.values(), key=lambda c: -c.wire_bytes)


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns {kind: {"count": per step, "wire_bytes": per device and step}}."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "wire_bytes": 0.0})
    for collective in collectives:
        table[collective.kind]["count"] += collective.count
        table[collective.kind]["wire_bytes"] += collective.wire_bytes
    return dict(sorted(table.items(), key=lambda item: -item[1]["wire_bytes"]))


def _walk(module: Module, name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
    """Yields every instruction that the computation runs: (name of its computation, instruction, number of runs)."""
    for instruction in module.computations.get(name, ()):
        yield name, instruction, times
        if _kind(instruction) in KINDS:
            continue  # to_apply of a reduction: the scalar addition
        inner = times
        if instruction.opcode == "while":
            inner *= module.trip_count(instruction) or 1
        for called in instruction.called:
            # All branches of a conditional are counted, because the data decide which one runs.
            yield from _walk(module, called, inner)


def channel_of(instruction: Instruction) -> str:
    """Returns the channel of a collective, which its pieces share, or ""."""
    channel = re.search(r"channel_id=(\d+)", instruction.line)
    return channel[1] if channel else ""


def as_collective(computation: str, instruction: Instruction) -> Collective | None:
    """Returns an instruction as a collective that runs once; None if it is none, or the end of one.

    computation: name of the computation that it is in.
    """
    kind = _kind(instruction)
    if kind not in KINDS:
        return None
    started = instruction.opcode.endswith("-start")
    sizes = array_bytes(instruction.type)
    groups = groups_of(instruction.line)
    is_permute = kind == "collective-permute"
    group = max(2, len(groups)) if is_permute else len(groups[0]) if groups else 2
    if started and kind in ("all-gather", "reduce-scatter", "collective-permute", "all-to-all"):
        # The type is (operands, results, flags); the larger of operand and result is the whole array.
        size = max(sizes)
    elif kind == "reduce-scatter":
        size = sum(sizes) * group
    else:
        size = sum(sizes)
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # on TPU, an all-reduce fused with the slice that is kept
    shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.type)
    return Collective(kind, size, group, 1, shape, instruction.op, groups)


def _kind(instruction: Instruction) -> str:
    kind = instruction.opcode.removesuffix("-start")
    return "all-to-all" if kind == "ragged-all-to-all" else kind


def groups_of(line: str) -> Groups:
    """Returns the devices that exchange data: replica_groups in any of HLO's three notations, or pairs; () if none."""
    if "source_target_pairs=" in line:
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", line.partition("_pairs=")[2]))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+?)\))? ?\{([^}]*)\}", line)
    if axes:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        names = list(sizes)
        grouped = re.findall(r"'([^']+)'", axes[3])
        ids = _iota(axes[2] or "", int(np.prod(list(sizes.values())))).reshape(*sizes.values())
        order = [names.index(name) for name in (*(n for n in names if n not in grouped), *grouped)]
        devices = ids.transpose(order).reshape(-1, int(np.prod([sizes[name] for name in grouped])))
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        devices = _iota(iota[3], int(iota[1]) * int(iota[2])).reshape(int(iota[1]), int(iota[2]))
    else:
        lists = re.search(r"replica_groups=\{(\{.*?\})\}", line)
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", lists[1])) if lists else ()
    return tuple(tuple(int(d) for d in row) for row in devices)


def _iota(text: str, count: int) -> np.ndarray:
    """Returns 0, 1, ..., count - 1 in the order of HLO's notation, "[2,4]T(1,0)": counted in rows, read in columns."""
    ids = np.arange(count)
    tiles = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiles:
        ids = ids.reshape([int(d) for d in tiles[1].split(",")])
        if tiles[2]:
            ids = ids.transpose([int(d) for d in tiles[2].split(",")])
    return ids.reshape(-1)
