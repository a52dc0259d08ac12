"""Chooses the number of slots by the memory that is free, if decode.slots is 0."""

import os

import jax

from isheep_jax.decode.cache import abstract_cache, cache_length, data_shards
from isheep_jax.decode.programs import DecodeShape
from isheep_jax.errors import UserError
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.sharding import DECODE_RULES

# Fraction of an accelerator's memory for weights and cache; the rest is for activations.
_DEVICE_FRACTION = 0.85
# Fraction of host memory for weights and cache on a CPU; the rest is left to other programs.
_HOST_FRACTION = 0.5
# Fewest slots of a data shard, if they fit in memory. On a CPU, XLA's products of fewer rows sum in another order, so
# that the number of slots would change what is sampled.
FEWEST_SLOTS = 32
# More slots of a data shard gain nothing on a CPU: the products of 256 rows are at the arithmetic limit.
_MOST_SLOTS_ON_CPU = 256
# Arrays of the size of float32 logits that exist at the same time while tokens are sampled.
_LOGITS_COPIES = 4


def fitting_slots(shape: DecodeShape, useful: int) -> int:
    """Returns the most slots, over all devices, whose caches fit in memory together with the weights.

    Args:
        shape: gives the model and `cache_length`; its `slots` do not matter.
        useful: more slots than this are not needed; `FEWEST_SLOTS` of each data shard are returned even so.

    Raises `UserError` when not even one fits on each data shard.
    """
    devices = list(shape.mesh.local_devices)
    on_cpu = devices[0].platform == "cpu"
    memory = (_HOST_FRACTION if on_cpu else _DEVICE_FRACTION) * local_memory(devices[0])
    tensor_shards = shape.mesh.shape[DECODE_RULES.kv_heads]
    weights = abstract_weights(shape.architecture, shape.weights_dtype, shape.compute_dtype)
    free = memory - _bytes(weights) / tensor_shards
    row = abstract_cache(shape.architecture, 1, shape.cache_length, shape.cache_dtype, shape.mesh)
    slot_bytes = (_bytes(row) + 4 * _LOGITS_COPIES * shape.architecture.vocab_size) / tensor_shards
    fitting = int(free // slot_bytes)
    if fitting < 1:
        raise UserError(
            f"decode.max_length: one sequence of {shape.cache_length} tokens ({slot_bytes / 2**30:.2f} GiB) does not "
            "fit in memory next to the weights; set decode.max_length lower, or mesh.decode_tensor higher"
        )
    shards = data_shards(shape.mesh)
    most = max(FEWEST_SLOTS, min(useful // shards, _MOST_SLOTS_ON_CPU if on_cpu else useful))
    return _round_down(min(fitting, most)) * shards


def step_bytes(shape: DecodeShape) -> tuple[float, float]:
    """Returns the bytes that a decode step reads on a device: of the weights, and of each cache position of a slot."""
    tensor_shards = shape.mesh.shape[DECODE_RULES.kv_heads]
    weights = abstract_weights(shape.architecture, shape.weights_dtype, shape.compute_dtype)
    row = abstract_cache(shape.architecture, 1, shape.cache_length, shape.cache_dtype, shape.mesh)
    position = _bytes(row) / cache_length(shape.cache_length) / data_shards(shape.mesh)
    return _bytes(weights) / tensor_shards, position / tensor_shards


def local_memory(device: jax.Device) -> float:
    """Returns the bytes that a program may use on a local device: its allocator's limit, or the share of a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Virtual devices of a CPU share its memory.
    return total / len(jax.local_devices())


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _round_down(count: int) -> int:
    """Rounds down to a quarter between two powers of two, so that few programs are compiled."""
    quarter = max(1, (1 << (count.bit_length() - 1)) // 4)
    return count // quarter * quarter
