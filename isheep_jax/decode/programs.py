"""The compiled programs of text generation: a shared prefix, prefill of prompts into slots, a chunk of decode steps.

All are module-level, take the weights as arguments and the architecture as a static one, so that they compile once per
process and shape for all iterations of a run. What changes from call to call stays on the devices, donated: the host
sends one packed array per call, and gets one back.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from isheep_jax.decode.cache import (
    abstract_cache,
    allocate,
    cache_sharding,
    constrain_cache,
    constrain_rows,
    decode_activations,
    decode_setup,
    replicate,
    rows_sharding,
)
from isheep_jax.decode.packing import AT, SEGMENT, SLOT, TOKEN
from isheep_jax.decode.sampling import GENERATED, PROMPT, DeviceSamplingParams, logprobs_of, sample
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import CacheWrite, KVCache, PrefixKV, init_cache
from isheep_jax.model.quantization import StorageDtype, abstract_weights, weight_table
from isheep_jax.model.transformer import forward, logits
from isheep_jax.sharding import DECODE_RULES, param_shardings

Tree = Any

# Columns of `Slots.control`.
LAST = 0  # the sequence's last token, whose keys and values are not in the cache yet, or come there again
PLACE = 1  # the slot of the cache where it belongs
REMAINING = 2  # tokens that may still be drawn; 0: the slot is idle
KEY = slice(3, 5)  # the request's random key, bits of two uint32
CONTROL_COLUMNS = 5
# Column of the updates [B, 6] behind those of the control: 1 where they replace it.
CHANGED = 5


@flax.struct.dataclass
class Slots:
    """The state of all slots between two calls.

    cache: B rows. control: [B, 5] int32, see the columns above. seen: [B, V] uint8, bits of `sampling`, or None where
    there are no penalties.
    """

    cache: KVCache
    control: jax.Array
    seen: jax.Array | None = None


@flax.struct.dataclass
class Prefix:
    """What all sequences of a call begin with.

    cache: of one row, always of floats: that is little memory. length: scalar, tokens (slots behind are padding).
    """

    cache: KVCache
    length: jax.Array


def prefix_sharding(mesh: Mesh | None) -> NamedSharding | SingleDeviceSharding:
    """Of a prefix's keys and values: on every data shard, heads split."""
    where = cache_sharding(mesh)
    return where if mesh is None else NamedSharding(mesh, PartitionSpec(None, None, *where.spec[2:]))


def prefix_kv(prefix: Prefix | None) -> tuple[PrefixKV, ...]:
    """The prefix as every token sees it."""
    if prefix is None:
        return ()
    slots = jnp.arange(prefix.cache.length, dtype=jnp.int32)
    return (PrefixKV(prefix.cache, (slots < prefix.length)[None, None], slots[None]),)


def prefix_length(prefix: Prefix | None) -> jax.Array | int:
    return 0 if prefix is None else prefix.length


def new_slots(
    architecture: Architecture, slots: int, context: int, dtype: jnp.dtype, mesh: Mesh | None, *, penalties: bool
) -> Slots:
    """Idle slots."""
    control = jax.device_put(np.zeros((slots, CONTROL_COLUMNS), np.int32), rows_sharding(mesh))
    seen = jnp.zeros((slots, architecture.vocab_size), jnp.uint8, device=rows_sharding(mesh)) if penalties else None
    return Slots(allocate(architecture, slots, context, dtype, mesh), control, seen)


@functools.partial(jax.jit, donate_argnames="seen")
def mark_prompts(seen: jax.Array, slots: np.ndarray, tokens: np.ndarray) -> jax.Array:
    """The tokens of new prompts in the place of what their slots have seen.

    slots: [A], outside 0..B-1 for none. tokens: [A, T], outside 0..V-1 for none.
    """
    seen = seen.at[slots].set(0, mode="drop")
    return seen.at[slots[:, None], tokens].set(PROMPT, mode="drop")


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def make_prefix(
    params: dict,
    tokens: np.ndarray,
    length: np.ndarray,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> Prefix:
    """Keys and values of a prefix. tokens: [P] int32, of which the first `length` count."""
    # Every data shard computes the same row, so that each has the result.
    shards = 1 if mesh is None else mesh.shape[DECODE_RULES.batch]
    tokens = constrain_rows(jnp.broadcast_to(tokens, (shards, *tokens.shape)), mesh)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    _, cache = forward(
        params,
        architecture,
        tokens,
        positions,
        decode_setup(mesh, compute_dtype),
        collect_kv=True,
    )
    where = prefix_sharding(mesh)
    return Prefix(
        jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[:, :1], where), cache), replicate(length, mesh)
    )


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"), donate_argnames=("cache",))
def prefill(
    params: dict,
    cache: KVCache,
    packed: np.ndarray,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> KVCache:
    """Writes the keys and values of prompts into their slots. Returns the cache.

    packed: [R, T, 4] int32, see `packing`; a token's slot lies on the data shard of its row. The first decode step
    comes back to the last token of a prompt, and so draws the first new token as it draws all others.
    """
    packed = constrain_rows(packed, mesh)
    _, cache = forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., AT] + prefix_length(prefix),
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
        prefix_kv=prefix_kv(prefix),
        cache=CacheWrite(cache, packed[..., AT], packed[..., SLOT]),
    )
    return constrain_cache(cache, mesh)


@functools.partial(jax.jit, static_argnames=("length", "mesh"), donate_argnames=("cache",))
def copy_slots(cache: KVCache, pairs: np.ndarray, *, length: int, mesh: Mesh | None) -> KVCache:
    """Copies the first `length` slots of one row to another, within a data shard. pairs: [R, 2], from and to; -1: none.

    R is a multiple of the data shards, and those of a shard stand together.
    """

    def copy(x, pairs):
        rows = x.shape[1]
        source, target = pairs[:, 0] % rows, jnp.where(pairs[:, 1] < 0, rows, pairs[:, 1] % rows)
        size = -(-length * x.shape[2] // cache.length)
        return x.at[:, target, :size].set(x[:, source, :size], mode="drop")

    if mesh is not None:
        split = cache_sharding(mesh).spec
        copy = jax.shard_map(copy, mesh=mesh, in_specs=(split, rows_sharding(mesh).spec), out_specs=split)
    return jax.tree.map(lambda x: copy(x, pairs), cache)


@functools.partial(jax.jit, static_argnames="mesh")
def take_slots(slots: Slots, rows: np.ndarray, *, mesh: Mesh | None) -> Slots:
    """Fewer slots: those of the given rows, all on one data shard."""
    seen = None if slots.seen is None else constrain_rows(slots.seen[rows], mesh)
    cache = constrain_cache(jax.tree.map(lambda x: x[:, rows], slots.cache), mesh)
    return Slots(cache, constrain_rows(slots.control[rows], mesh), seen)


def decode_chunk(
    params: dict,
    slots: Slots,
    updates: jax.Array,
    settings: DeviceSamplingParams,
    limits: jax.Array,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    chunk: int,
    end_ids: tuple[int, ...],
    logprobs: bool,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> tuple[Slots, jax.Array]:
    """Up to `chunk` decode steps of all slots.

    updates: [B, 6] int32, new control of some slots. limits: [2] int32; the loop ends early when as many slots are
    idle as the first says, but not before as many steps as the second. end_ids: tokens that end a sequence.
    Returns the slots and the drawn tokens [1, B, chunk] int32, end tokens included, -1 where a slot was idle; with
    logprobs [2, B, chunk], where the second has the bits of their float32 log-probabilities.
    """
    updates = constrain_rows(updates, mesh)
    control = jnp.where(updates[:, CHANGED:] > 0, updates[:, :CHANGED], slots.control)
    keys = jax.lax.bitcast_convert_type(control[:, KEY], jnp.uint32)
    shared_kv, before = prefix_kv(prefix), prefix_length(prefix)

    def unfinished(carry):
        step, remaining = carry[0], carry[4]
        idle = jnp.sum(remaining == 0)
        return (step < chunk) & (idle < remaining.shape[0]) & ((idle < limits[0]) | (step < limits[1]))

    def advance(carry):
        step, cache, token, place, remaining, seen, drawn = carry
        busy = remaining > 0
        hidden, cache = forward(
            params,
            architecture,
            token[:, None],
            place[:, None] + before,
            decode_setup(mesh, compute_dtype),
            prefix_kv=shared_kv,
            cache=CacheWrite(cache, jnp.where(busy, place, -1)[:, None]),
        )
        scores = logits(params, architecture, hidden[:, 0], compute_dtype)
        new = sample(scores, keys, place + before + 1, settings, seen, mesh=mesh)
        if seen is not None:
            rows, drop = jnp.arange(new.shape[0]), seen.shape[1]
            marked = jnp.take_along_axis(seen, new[:, None], axis=1)[:, 0] | jnp.uint8(GENERATED)
            seen = constrain_rows(seen.at[rows, jnp.where(busy, new, drop)].set(marked, mode="drop"), mesh)
        ended = functools.reduce(jnp.logical_or, [new == end for end in end_ids], jnp.zeros_like(busy))
        told = [jnp.where(busy, new, -1)]
        if logprobs:
            told.append(jax.lax.bitcast_convert_type(logprobs_of(scores, new), jnp.int32))
        drawn = drawn.at[:, :, step].set(jnp.stack(told))
        left = jnp.where(ended, 0, remaining - 1)
        return (
            step + 1,
            constrain_cache(cache, mesh),
            jnp.where(busy, new, token),
            place + busy,
            jnp.where(busy, left, 0),
            seen,
            drawn,
        )

    drawn = jnp.full((2 if logprobs else 1, control.shape[0], chunk), -1, jnp.int32)
    start = (0, slots.cache, control[:, LAST], control[:, PLACE], control[:, REMAINING], slots.seen, drawn)
    _, cache, token, place, remaining, seen, drawn = jax.lax.while_loop(unfinished, advance, start)
    control = jnp.concatenate([jnp.stack([token, place, remaining], axis=1), control[:, KEY]], axis=1)
    return Slots(cache, constrain_rows(control, mesh), seen), replicate(drawn, mesh)


@dataclass(frozen=True)
class ChunkShape:
    """What `decode_chunk` is compiled for: `slots` rows of `context` tokens.

    prefix: slots of what all rows begin with; 0: nothing. weights, cache: how they are stored. The rest as in
    `decode_chunk`.
    """

    architecture: Architecture
    slots: int
    context: int
    chunk: int
    end_ids: tuple[int, ...]
    mesh: Mesh | None
    compute_dtype: jnp.dtype
    weights: StorageDtype = "model"
    cache: StorageDtype = "model"
    prefix: int = 0
    penalties: bool = False
    logprobs: bool = False

    @property
    def cache_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.int8) if self.cache == "int8" else self.compute_dtype


def weight_places(shape: ChunkShape) -> Tree:
    """For each parameter where it lies while decoding: its sharding, and on TPUs the layout that the program chose."""
    if decode_activations(shape.mesh).platform != "tpu":
        return _weight_shardings(shape)
    return compile_decode_chunk(shape, shape).input_formats[0][0]


@functools.lru_cache(maxsize=16)
def compile_decode_chunk(shape: ChunkShape, settled: ChunkShape) -> jax.stages.Compiled:
    """`decode_chunk` compiled once per process and shape, without its static arguments. See `lower_decode_chunk`."""
    return lower_decode_chunk(shape, settled).compile()


def lower_decode_chunk(shape: ChunkShape, settled: ChunkShape) -> jax.stages.Lowered:
    """The program for any devices, here or not. settled: the shape whose program chooses where the weights lie.

    On TPUs the compiler chooses the layout of the weights: it would rather have some of them transposed, and would copy
    them in every chunk: 1.25 GiB per chip for Llama 3 70B on a v4-256, 4 % of its memory (planned).
    """
    architecture, slots, mesh, compute_dtype = shape.architecture, shape.slots, shape.mesh, shape.compute_dtype
    prefix, penalties = shape.prefix, shape.penalties
    if shape != settled:
        weights = weight_places(settled)
    else:
        weights = _weight_shardings(shape)
        if decode_activations(mesh).platform == "tpu":
            weights = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), weights)
    split = cache_sharding(mesh)
    count = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    cache = abstract_cache(architecture, slots, shape.context, shape.cache_dtype, mesh)
    state = Slots(
        cache,
        count((slots, CONTROL_COLUMNS)),
        jax.ShapeDtypeStruct((slots, architecture.vocab_size), jnp.uint8) if penalties else None,
    )
    places = Slots(
        jax.tree.map(lambda _: split, cache), rows_sharding(mesh), rows_sharding(mesh) if penalties else None
    )
    shared = where = None
    if prefix:
        where = prefix_sharding(mesh)
        where = Prefix(KVCache(where, where), split if mesh is None else NamedSharding(mesh, PartitionSpec()))
        shared = Prefix(jax.eval_shape(lambda: init_cache(architecture, 1, prefix, compute_dtype)), count(()))
    return jax.jit(
        functools.partial(
            decode_chunk,
            architecture=architecture,
            chunk=shape.chunk,
            end_ids=shape.end_ids,
            logprobs=shape.logprobs,
            mesh=mesh,
            compute_dtype=compute_dtype,
        ),
        in_shardings=(weights, places, None, None, None, where),
        out_shardings=(places, None),
        donate_argnums=1,
    ).lower(
        abstract_weights(architecture, shape.weights, compute_dtype),
        state,
        count((slots, CONTROL_COLUMNS + 1)),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), DeviceSamplingParams()),
        count((2,)),
        shared,
    )


def _weight_shardings(shape: ChunkShape) -> Tree:
    table = weight_table(shape.architecture, shape.weights)
    if shape.mesh is None:
        return jax.tree.map(lambda _: cache_sharding(None), table)
    return param_shardings(table, shape.mesh, DECODE_RULES)
