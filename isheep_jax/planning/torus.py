"""How fast the chips of a group exchange data: the links between them on the torus of a slice.

A chip has links to its neighbors only, so a collective over one axis of a mesh uses those of its links that lie inside
the group. Links of a chip: two for each dimension of the torus, one in each direction; at the edge of a dimension that
is not wrapped around, one is missing.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from jax.sharding import Mesh

from isheep_jax.planning.collectives import Collective, Groups
from isheep_jax.planning.hardware import Slice

Coordinates = tuple[int, ...]

# Seconds for the first byte to reach the neighbor (Austin et al. 2025, How To Scale Your Model, chapter 3: about a
# microsecond).
HOP = 1e-6


@dataclass(frozen=True)
class Torus:
    """The chips of a program's mesh, by their index in it, and the links between them.

    coordinates: of each chip in its slice.
    slices: the slice of each chip.
    shape: chips of a slice in each dimension.
    wrap: whether a dimension is a ring.
    link: bytes per second of a link in one direction.
    network: bytes per second of a chip to other slices, by the data center network.
    """

    coordinates: tuple[Coordinates, ...]
    slices: tuple[int, ...]
    shape: tuple[int, ...]
    wrap: tuple[bool, ...]
    link: float
    network: float

    @classmethod
    def of(cls, mesh: Mesh, tpu_slice: Slice) -> "Torus":
        """Returns the torus that the chips of a mesh form. tpu_slice: the slice that each of them is in."""
        devices, dimensions = list(mesh.devices.flat), len(tpu_slice.shape)
        return cls(
            coordinates=tuple(tuple(device.coords[:dimensions]) for device in devices),
            slices=tuple(getattr(device, "slice_index", 0) for device in devices),
            shape=tpu_slice.shape,
            wrap=tpu_slice.wrap,
            link=tpu_slice.chip.link,
            network=tpu_slice.chip.network,
        )

    def seconds(self, collective: Collective) -> float:
        """Returns the time of one run of a collective that nothing else shares the links with."""
        groups = collective.groups or (tuple(range(len(self.coordinates))),)
        if any(len({self.slices[chip] for chip in group}) > 1 for group in groups):
            return collective.wire_bytes / collective.count / self.network
        if collective.kind in ("collective-permute", "collective-broadcast"):
            load = max(self._loads(groups).values(), default=0)
            return self._hops(groups) * HOP + collective.size * load / self.link
        rounds = 2 if collective.kind == "all-reduce" else 1
        links = self.links(groups)
        return rounds * self._hops(groups) * HOP + collective.wire_bytes / collective.count / (links * self.link)

    def links(self, groups: Groups) -> float:
        """Returns how many links' bandwidth each chip has, in one direction, while all groups exchange data at once.

        A box of the torus has a ring of two links along each dimension that it spans from end to end of a wrapped
        torus, and one link along others, there and back. Other groups form one ring in the order of their chips; its
        parts that run over the same link share it.
        """
        return max(self._ring_links(groups), min(self._box_links(group) for group in groups))

    def _box_links(self, group: tuple[int, ...]) -> float:
        """Returns the links of a group that is a box, and 0 for any other."""
        links, volume = 0, 1
        for dimension, (size, wrapped) in enumerate(zip(self.shape, self.wrap)):
            places = sorted({self.coordinates[chip][dimension] for chip in group})
            if places[-1] - places[0] != len(places) - 1:
                return 0
            volume *= len(places)
            if len(places) > 1:
                links += 2 if wrapped and len(places) == size else 1
        return links if volume == len(group) else 0

    def _ring_links(self, groups: Groups) -> float:
        pairs = [pair for group in groups for pair in zip(group, (*group[1:], group[0]))]
        loads = self._loads([*pairs, *((b, a) for a, b in pairs)])
        return 2 / max(loads.values(), default=2)

    def _loads(self, pairs: Iterable[tuple[int, ...]]) -> Counter[tuple[int, Coordinates, Coordinates]]:
        """Returns how many of the (source, target) pairs send over each link, each dimension after the other."""
        loads: Counter[tuple[int, Coordinates, Coordinates]] = Counter()
        for source, target in pairs:
            here = self.coordinates[source]
            for dimension, size in enumerate(self.shape):
                step, count = self._way(here, self.coordinates[target], dimension)
                for _ in range(count):
                    there = list(here)
                    there[dimension] = (here[dimension] + step) % size
                    loads[self.slices[source], here, tuple(there)] += 1
                    here = tuple(there)
        return loads

    def _way(self, source: Coordinates, target: Coordinates, dimension: int) -> tuple[int, int]:
        """Returns the shorter way along a dimension: its direction, 1 or -1, and the number of links."""
        distance = target[dimension] - source[dimension]
        size = self.shape[dimension]
        if self.wrap[dimension] and 2 * abs(distance) > size:
            distance -= size if distance > 0 else -size
        return (1 if distance > 0 else -1), abs(distance)

    def _hops(self, groups: Groups) -> int:
        """Returns the links between the two chips of a group that are farthest apart."""
        return max(
            (self._distance(group[0], chip) for group in groups for chip in group),
            default=0,
        )

    def _distance(self, source: int, target: int) -> int:
        a, b = self.coordinates[source], self.coordinates[target]
        return sum(self._way(a, b, dimension)[1] for dimension in range(len(self.shape)))
