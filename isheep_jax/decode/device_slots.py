"""The slots' state on the devices between two calls: KV caches, the next step's inputs, the tokens seen so far."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import (
    allocate_cache,
    cache_sharding,
    constrain_rows,
    rows_sharding,
)
from isheep_jax.decode.sampling import PROMPT
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.sharding import put

# Columns of `DeviceSlots.control` [B, 5] (int32).
LAST_TOKEN = 0  # the sequence's last token; the next step writes its keys and values (after prefill: once more)
CACHE_POSITION = 1  # the cache position that they are written to
REMAINING = 2  # tokens that may still be sampled; 0: the slot is idle
KEY = slice(3, 5)  # the request's random key, the bits of two uint32
CONTROL_COLUMNS = 5
# The host's updates of the control [B, 6] have one more column: 1 where the row replaces that of the control.
CHANGED = 5
UPDATE_COLUMNS = 6
# In place of a token that was sampled from logits that are not numbers (NaN or infinity).
NOT_NUMBERS = -2


@flax.struct.dataclass
class DeviceSlots:
    """State of all slots."""

    cache: KVCache  # B rows
    control: jax.Array  # [B, 5] int32, see the columns above
    seen: jax.Array | None = None  # [B, V] uint8, bits of `sampling`; None: there are no penalties


def new_slots(
    architecture: Architecture, slots: int, tokens: int, dtype: jnp.dtype, mesh: Mesh, *, penalties: bool
) -> DeviceSlots:
    """Returns idle slots.

    Args:
        architecture: the model's.
        slots: B.
        tokens: longest sequence that a slot holds.
        dtype: of the KV cache.
        mesh: the decode mesh.
        penalties: whether to keep track of the tokens that sequences hold.
    """
    control = put(np.zeros((slots, CONTROL_COLUMNS), np.int32), rows_sharding(mesh))
    seen = _nothing_seen(slots, architecture.vocab_size, mesh) if penalties else None
    return DeviceSlots(allocate_cache(architecture, slots, tokens, dtype, mesh), control, seen)


@functools.partial(jax.jit, static_argnames=("slots", "vocab_size", "mesh"))
def _nothing_seen(slots: int, vocab_size: int, mesh: Mesh) -> jax.Array:
    return constrain_rows(jnp.zeros((slots, vocab_size), jnp.uint8), mesh)


@functools.partial(jax.jit, donate_argnames="seen")
def mark_prompts(seen: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `seen` with the rows of some slots replaced by the tokens of their new prompts.

    Args:
        seen: [B, V] uint8, bits of `sampling`; donated.
        slots: [A] int32; outside 0..B-1: padding.
        tokens: [A, T] int32; outside 0..V-1: padding.
    """
    seen = seen.at[slots].set(0, mode="drop")
    return seen.at[slots[:, None], tokens].set(PROMPT, mode="drop")


@functools.partial(jax.jit, static_argnames=("length", "mesh"), donate_argnames=("cache",))
def copy_rows(cache: KVCache, pairs: jax.Array, *, length: int, mesh: Mesh) -> KVCache:
    """Returns the cache with the first positions of some rows copied to other rows of the same data shard.

    Args:
        cache: donated.
        pairs: [R, 2] int32, rows to copy from and to; -1: padding. R is a multiple of the data shards, and the pairs of
            a shard are consecutive.
        length: cache positions to copy.
        mesh: the decode mesh.
    """

    def copy(x, pairs):
        rows = x.shape[1]
        source, target = pairs[:, 0] % rows, jnp.where(pairs[:, 1] < 0, rows, pairs[:, 1] % rows)
        size = -(-length * x.shape[2] // cache.length)
        return x.at[:, target, :size].set(x[:, source, :size], mode="drop")

    spec = cache_sharding(mesh).spec
    copy = jax.shard_map(copy, mesh=mesh, in_specs=(spec, rows_sharding(mesh).spec), out_specs=spec)
    return jax.tree.map(lambda x: copy(x, pairs), cache)


@functools.partial(jax.jit, static_argnames="mesh")
def take_slots(slots: DeviceSlots, rows: jax.Array, *, mesh: Mesh) -> DeviceSlots:
    """Returns the slots of the given rows alone.

    Args:
        slots: B of them.
        rows: [B'] int32, slots; those of a data shard are consecutive, and each shard keeps as many.
        mesh: the decode mesh.
    """

    def take(axis: int):
        return lambda x, rows: jnp.take(x, rows % x.shape[axis], axis=axis)

    kv, of_rows = cache_sharding(mesh).spec, rows_sharding(mesh).spec
    take_cache = jax.shard_map(take(1), mesh=mesh, in_specs=(kv, of_rows), out_specs=kv)
    take_rows = jax.shard_map(take(0), mesh=mesh, in_specs=(of_rows, of_rows), out_specs=of_rows)
    return DeviceSlots(
        jax.tree.map(lambda x: take_cache(x, rows), slots.cache),
        take_rows(slots.control, rows),
        None if slots.seen is None else take_rows(slots.seen, rows),
    )
