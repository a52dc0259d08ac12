"""Published figures of chips, and descriptions of the devices of TPU slices that this machine does not have.

libtpu describes any slice on a machine without a TPU, and compiles for it.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from isheep_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one TPU chip or GPU.

    flops: bfloat16 multiplications and additions (per second).
    hbm: memory that a program may use (bytes).
    hbm_bandwidth: bytes per second.
    interconnect: sum of all links of a chip in one direction (bytes per second); 0: there are no links.
    links: links of a chip, one of each to every neighbor; 0: chips are connected by a switch.
    clock: cycles per second; 0: not known.
    network: to other slices, by the data center network (bytes per second); 0: not known.
    """

    name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    interconnect: float
    links: int = 0
    clock: float = 0.0
    network: float = 0.0

    @property
    def link(self) -> float:
        """Bytes per second of one link in one direction."""
        return self.interconnect / self.links


# Peak FLOPs, HBM bandwidth and interconnect are from the specification tables at docs.cloud.google.com/tpu/docs/v4,
# /v5e, /v5p and /v6e (read in 2026). v4's interconnect is from Jouppi et al. 2023 (arXiv 2304.01433, table 4: six links
# of 50 GB/s); v5p's is 4,800 Gbit/s; those of v5e and v6e are half of the 400 and 800 GB/s that are stated for both
# directions. Links: six in a 3D torus, four in a 2D one. The network of v5p is there (50 Gbit/s per chip); v5e's is
# 6.4 Tbit/s of a pod of 256, and the others are assumed to have v5p's. The usable HBM is what libtpu reports when a
# program does not fit; it is less than the chip has.
# v4's clock is from Jouppi et al. (1,050 MHz). The others follow from the peak and the matrix units on the same pages:
# FLOPs = 2 x units x 128 x 128 x clock, where v5e has 4 units, v5p 8, and v6e 2 of 256 x 256 that count as 16 (two
# products per cycle, or the clock would be 3.5 GHz). At these clocks the compiler's estimates of a product of 8,192 x
# 8,192 matrices are 88 to 93 % of the peak on v4, v5e and v5p, and 70 % on v6e; those of one that reads weights for 64
# rows are 75, 73, 62 and 86 % of the HBM's bandwidth.
TPU_CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1200e9, 300e9, links=6, clock=1.05e9, network=6.25e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9, links=4, clock=1.5e9, network=3.125e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 600e9, links=6, clock=1.75e9, network=6.25e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1638e9, 400e9, links=4, clock=1.75e9, network=6.25e9),
}
# From the data sheets of the NVIDIA A100, H100 and H200 (SXM): dense bfloat16, NVLink in one direction. The usable
# memory is read from the local device instead.
GPU_CHIPS = {
    "A100": Chip("NVIDIA A100", 312e12, 80e9, 2039e9, 300e9),
    "H100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9),
    "H200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9),
}

# The share of a GPU's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_MEMORY_SHARE = 0.75

# Chips by a part of their `device_kind`; "v5 lite" comes before "v5", which is a part of it.
_CHIP_BY_KIND = {
    **GPU_CHIPS,
    "v4": TPU_CHIPS["v4"],
    "v5 lite": TPU_CHIPS["v5e"],
    "v5": TPU_CHIPS["v5p"],
    "v6": TPU_CHIPS["v6e"],
}

# Shapes of Google Cloud's slices by number of chips. The names of v4 and v5p slices count TensorCores, two per chip.
_CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
    512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
}  # fmt: skip
_SQUARES = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
# Memory of a host by its chips (bytes), from the tables of machine types at docs.cloud.google.com (tpu/docs/v5e,
# kubernetes-engine/docs/concepts/plan-tpus; read in 2026).
_HOST_MEMORY = {
    "v4": {4: 407e9},
    "v5e": {1: 48e9, 4: 192e9, 8: 384e9},
    "v5p": {4: 448e9},
    "v6e": {1: 176e9, 4: 720e9, 8: 1440e9},
}
_SHAPES = {"v4": _CUBES, "v5p": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES}
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}


@dataclass(frozen=True)
class Slice:
    """A TPU slice, whose chips are connected by the interconnect."""

    generation: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return TPU_CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def host(self) -> tuple[int, int, int]:
        """The chips of a host in each dimension: four, but all of a slice of one or eight v5e or v6e chips."""
        if len(self.shape) == 3:
            return (2, 2, 1)
        return {1: (1, 1, 1), 8: (2, 4, 1)}.get(self.chips, (2, 2, 1))

    @property
    def chips_per_host(self) -> int:
        return math.prod(self.host)

    @property
    def host_memory(self) -> float:
        """Bytes of memory of a host."""
        return _HOST_MEMORY[self.generation][self.chips_per_host]

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether each dimension is a ring: those of whole cubes of 4 x 4 x 4, and those of a whole row of 16."""
        if len(self.shape) == 3:
            return (min(self.shape) >= 4,) * 3
        return tuple(size == 16 for size in self.shape)


def parse_topology(name: str) -> Slice:
    """Parses the name of a slice in Google Cloud, such as "v4-256" (128 chips) or "v5e-16" (16 chips).

    Raises `UserError`, naming the valid sizes, for a generation or size that does not exist.
    """
    match = re.fullmatch(r"(v4|v5e|v5litepod|v5p|v6e)-(\d+)", name)
    if not match:
        raise UserError(f"--mesh.topology: '{name}' is not a slice; such as v4-256, v5e-16, v5p-128 or v6e-8")
    generation = "v5e" if match[1] == "v5litepod" else match[1]
    cores, shapes = _CORES[generation], _SHAPES[generation]
    chips, remainder = divmod(int(match[2]), cores)
    if remainder or chips not in shapes:
        known = ", ".join(f"{generation}-{n * cores}" for n in shapes)
        raise UserError(f"--mesh.topology: there is no slice '{name}'; there are {known}")
    return Slice(generation, shapes[chips])


def prepare_environment(topology: str) -> None:
    """Sets the variables that libtpu needs to describe a slice. Must be called before the first import of jax."""
    if topology:
        # jax must not occupy a GPU or TPU of this machine, because programs are only compiled.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # libtpu's lock protects a TPU, and none is used.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")


def slice_devices(topology: str, slices: int) -> list[Any]:
    """Returns descriptions of the devices of `slices` slices, to compile for. Raises `UserError` without libtpu."""
    from jax.experimental import topologies

    tpu_slice = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--mesh.topology={topology}: its compiler, libtpu, is not installed: pip install 'isheep_jax[plan]'"
        )
    return list(topologies.get_topology_desc(**topology_arguments(tpu_slice, slices)).devices)


def topology_arguments(tpu_slice: Slice, slices: int) -> dict[str, Any]:
    """Returns libtpu's arguments for a slice: four chips per host, one device per v4 or v5p chip, full tori wrapped."""
    shape = tpu_slice.shape
    arguments: dict[str, Any] = {
        "platform": "tpu",
        "topology_name": f"{tpu_slice.generation}:{'x'.join(map(str, shape))}",
        "num_slices": slices,
    }
    arguments["chips_per_host_bounds"] = tpu_slice.host
    if len(shape) == 3:
        arguments["chip_config_name"] = "megacore"
    if any(tpu_slice.wrap):
        arguments["wrap"] = (*tpu_slice.wrap, False)[:3]
    return arguments


def gpu_chip(name: str) -> Chip:
    """Returns a GPU's figures by its name. Raises `UserError`, naming those that are known, for any other."""
    if name.upper() not in GPU_CHIPS:
        raise UserError(f"--gpu: '{name}' is not known; known: {', '.join(GPU_CHIPS)}")
    return GPU_CHIPS[name.upper()]


def local_chip(device: Any) -> Chip | None:
    """Returns the chip of a local device; None for a CPU or a device without public figures."""
    return next((chip for part, chip in _CHIP_BY_KIND.items() if part in device.device_kind), None)
