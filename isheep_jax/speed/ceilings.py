"""Measures what this machine can do: the fastest copy, and the fastest matrix products at a model's own shapes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.model.architecture import Architecture, parameter_table

# Bytes of the copied array on each device, larger than any processor's cache.
_COPIED = {"cpu": 2**28, "gpu": 2**31, "tpu": 2**31}
# Rows of the products' left side on each device: enough that arithmetic is the limit.
_ROWS = {"cpu": 512, "gpu": 8192, "tpu": 8192}
# Tries of each measurement, of which the fastest counts; the first ones are slower.
_TRIES = 7
# Times that the array is read and written in each try.
_COPIES = 8


@dataclass(frozen=True)
class Ceilings:
    """Peaks of all devices of a mesh together.

    flops: floating-point operations per second. bandwidth: bytes read and written per second.
    """

    flops: float
    bandwidth: float


def measure_ceilings(architecture: Architecture, mesh: Mesh, dtype: jnp.dtype) -> Ceilings:
    """Measures products of the sizes of a layer's weights in `dtype` and a large copy, each device by itself."""
    platform = next(iter(mesh.devices.flat)).platform
    rows, size = _ROWS[platform], _COPIED[platform] // 4
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    table = parameter_table(architecture)["layers"]
    # [inputs, outputs] of each matrix; which side a product sums over does not change its arithmetic.
    shapes = [_sides(spec.shape[1:], architecture.hidden_size) for spec in table.values() if spec.is_matrix]
    seconds = operations = 0.0
    for inputs, outputs in shapes:
        x = jnp.ones((mesh.size * rows, inputs), dtype, device=split)
        w = jnp.ones((inputs, outputs), dtype, device=NamedSharding(mesh, PartitionSpec()))
        seconds += _fastest(jax.jit(jnp.dot, out_shardings=split), x, w)
        operations += 2.0 * mesh.size * rows * inputs * outputs
    copied = jnp.zeros(mesh.size * size, jnp.float32, device=split)
    # Repeatedly over the same memory, because fresh memory is slower on a CPU.
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, _COPIES, lambda _, x: x + 1, x), donate_argnums=0)
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        copied = copy(copied).block_until_ready()
        times.append(time.perf_counter() - start)
    return Ceilings(operations / seconds, 2.0 * _COPIES * copied.nbytes / min(times))


def _sides(shape: tuple[int, ...], width: int) -> tuple[int, int]:
    """Returns a matrix's two sides, one of which is the model's width."""
    return width, math.prod(shape) // width


def _fastest(work: Callable, *arguments: jax.Array) -> float:
    """Returns the seconds of the fastest try."""
    work(*arguments).block_until_ready()
    times = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        work(*arguments).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
