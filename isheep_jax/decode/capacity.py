"""How many slots the memory holds, where the settings leave that open."""

import os

import jax

from isheep_jax.decode.cache import abstract_cache, data_shards
from isheep_jax.decode.programs import ChunkShape
from isheep_jax.errors import UserError
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.sharding import DECODE_RULES

# Share of a device's memory that weights and cache may take; the rest is for activations.
_SHARE = 0.85
# Of a CPU's memory, which other programs use, too.
_CPU_SHARE = 0.5
# XLA's products of fewer rows sum in another order on a CPU, and the schedule would change what is drawn.
FEWEST_SLOTS = 32
# On a CPU more slots gain nothing: the products of 256 rows are at the arithmetic limit.
_MOST_ON_CPU = 256
# Float32 logits, and arrays of their size, that live at the same time while a token is drawn.
_LOGITS = 4


def free_slots(shape: ChunkShape, useful: int) -> int:
    """The most slots, over all devices, that fit beside the weights with caches of `shape.context` tokens.

    useful: more than this, and than some tens, are not asked for.

    Raises `UserError` where not even one fits on each data shard.
    """
    devices = [jax.local_devices()[0]] if shape.mesh is None else list(shape.mesh.local_devices)
    on_cpu = devices[0].platform == "cpu"
    memory = (_CPU_SHARE if on_cpu else _SHARE) * local_memory(devices[0])
    tensor = 1 if shape.mesh is None else shape.mesh.shape[DECODE_RULES.kv_heads]
    weights = abstract_weights(shape.architecture, shape.weights, shape.compute_dtype)
    left = memory - _bytes(weights) / tensor
    row = abstract_cache(shape.architecture, 1, shape.context, shape.cache_dtype, shape.mesh)
    each = _bytes(row) / tensor + 4 * _LOGITS * shape.architecture.vocab_size / tensor
    here = int(left // each)
    if here < 1:
        raise UserError(
            f"decode.max_length: beside the weights there is no room for one sequence of {shape.context} tokens "
            f"({each / 2**30:.2f} GiB); set decode.max_length lower, or mesh.decode_tensor higher"
        )
    shards = data_shards(shape.mesh)
    most = max(FEWEST_SLOTS, min(useful // shards, _MOST_ON_CPU if on_cpu else useful))
    return _round_down(min(here, most)) * shards


def local_memory(device: jax.Device) -> float:
    """Bytes that a program may use on a device of this machine: of its allocator, or of the machine for a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Virtual devices of a CPU share its memory.
    return total / len(jax.local_devices())


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _round_down(count: int) -> int:
    """To one of four sizes in each power of two, so that few programs are compiled."""
    quarter = max(1, (1 << (count.bit_length() - 1)) // 4)
    return count // quarter * quarter
