"""The decode program: several decode steps of all slots in one device call.

It takes the weights as arguments and the architecture as a static one, so it compiles once per process and shape for
all iterations of a run. What changes from call to call stays on the devices, donated: the host sends one small array
per call and gets one back.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import (
    Sizing,
    abstract_cache,
    cache_sharding,
    constrain_cache,
    constrain_rows,
    data_shards,
    decode_setup,
    replicate,
    replicated,
    rows_sharding,
)
from isheep_jax.decode.device_slots import (
    CACHE_POSITION,
    CHANGED,
    CONTROL_COLUMNS,
    KEY,
    LAST_TOKEN,
    NOT_NUMBERS,
    REMAINING,
    UPDATE_COLUMNS,
    DeviceSlots,
)
from isheep_jax.decode.prefill import Prefix, prefix_kv, prefix_length, prefix_sharding
from isheep_jax.decode.sampling import GENERATED, DeviceSamplingParams, logprobs_of, sample, without
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.attention import decode_kernel_refusal, read_block
from isheep_jax.model.kv_cache import CacheWrite, KVCache, init_cache
from isheep_jax.model.quantization import StorageDtype, abstract_weights, weight_table
from isheep_jax.model.transformer import forward, logits
from isheep_jax.sharding import DECODE_RULES, ActivationSharding, param_shardings, platform_of

Tree = Any

# Slots of the nominal shape on each data shard, where the settings leave the number of slots to each call.
_NOMINAL_SLOTS = 64


@dataclass(frozen=True)
class DecodeShape:
    """Everything that a decode program is compiled for.

    slots: B.
    cache_length: tokens that a cache row must hold; the row itself has whole blocks.
    steps_per_call: decode steps of one call.
    eos_ids: tokens that end a sequence.
    missing_ids: ranges (from, to) of ids that the model has rows for and the tokenizer no tokens; never sampled.
    prefix_length: cache positions of the shared prefix, padding included; 0: no prefix.
    penalties: whether repetition and presence penalties apply.
    logprobs: whether the log-probabilities of sampled tokens are returned.
    key_limit: cache positions that attention reads, see `cache.Sizing`: no sequence may come to hold more in a
        call. 0: as many as the longest sequence holds, which the devices find out.
    """

    architecture: Architecture
    mesh: Mesh
    compute_dtype: jnp.dtype
    slots: int
    cache_length: int
    steps_per_call: int
    eos_ids: tuple[int, ...]
    missing_ids: tuple[tuple[int, int], ...] = ()
    weights_dtype: StorageDtype = "model"
    kv_cache_dtype: StorageDtype = "model"
    prefix_length: int = 0
    penalties: bool = False
    logprobs: bool = False
    key_limit: int = 0

    @classmethod
    def nominal(
        cls,
        config: DecodeConfig,
        architecture: Architecture,
        *,
        mesh: Mesh,
        compute_dtype: jnp.dtype,
        eos_ids: tuple[int, ...],
        missing_ids: tuple[tuple[int, int], ...] = (),
    ) -> "DecodeShape":
        """Returns the shape of the settings: all slots at their full length, no prefix, penalties or log-probabilities.

        Args:
            config: slots, lengths and dtypes of decoding.
            architecture: the model's.
            mesh: the decode mesh.
            compute_dtype: of activations.
            eos_ids: tokens that end a sequence.
            missing_ids: ranges of ids without a token.
        """
        return cls(
            architecture=architecture,
            mesh=mesh,
            compute_dtype=compute_dtype,
            slots=config.slots or _NOMINAL_SLOTS * data_shards(mesh),
            cache_length=config.max_length,
            steps_per_call=config.steps_per_call,
            eos_ids=eos_ids,
            missing_ids=missing_ids,
            weights_dtype=config.weights_dtype,
            kv_cache_dtype=config.kv_cache_dtype,
            key_limit=Sizing.of(mesh).key_limit(config.max_length),
        )

    @property
    def reads_sequences_alone(self) -> bool:
        """Whether a kernel reads each sequence as far as it goes, so that `key_limit` changes nothing."""
        return decode_kernel_refusal(*self._cache_and_split) is None

    @property
    def read_block(self) -> int:
        """Cache positions that a step reads at a time."""
        return read_block(*self._cache_and_split)

    @property
    def _cache_and_split(self) -> tuple[KVCache, int, ActivationSharding]:
        cache = abstract_cache(self.architecture, 1, self.cache_length, self.cache_dtype, self.mesh)
        return cache, self.architecture.head_dim, decode_setup(self.mesh, self.compute_dtype).sharding

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of keys and values."""
        return jnp.dtype(jnp.int8) if self.kv_cache_dtype == "int8" else self.compute_dtype


@flax.struct.dataclass
class DecodeState:
    """The state that a decode step passes on to the next. A slot is busy while `remaining` is above 0."""

    step: jax.Array | int  # scalar int32, steps done in this call
    cache: KVCache  # B rows; those of idle slots are not written
    last_token: jax.Array  # [B] int32, the token whose keys and values the next step writes
    cache_position: jax.Array  # [B] int32, where it writes them
    remaining: jax.Array  # [B] int32, tokens that may still be sampled
    seen: jax.Array | None  # [B, V] uint8, bits of `sampling`; None: there are no penalties
    # [1, B, steps] int32, -1 where a slot was idle, or `NOT_NUMBERS`; [2, B, steps] with the bits of float32 logprobs.
    sampled: jax.Array


def decode_steps(
    params: Tree,
    slots: DeviceSlots,
    updates: jax.Array,
    sampling: DeviceSamplingParams,
    limits: jax.Array,
    prefix: Prefix | None,
    *,
    shape: DecodeShape,
) -> tuple[DeviceSlots, jax.Array]:
    """Runs up to `shape.steps_per_call` decode steps of all slots.

    Args:
        params: weights.
        slots: state of the slots.
        updates: [B, 6] int32, new control of some slots.
        sampling: sampling parameters of all slots.
        limits: [2] int32. The call ends early once limits[0] slots are idle, but not before limits[1] steps.
        prefix: tokens that all the sequences begin with.
        shape: static.

    Returns the slots, and `DecodeState.sampled`, in which end tokens are included.
    """
    architecture, mesh, compute_dtype = shape.architecture, shape.mesh, shape.compute_dtype
    updates = constrain_rows(updates, mesh)
    control = jnp.where(updates[:, CHANGED:] > 0, updates[:, :CHANGED], slots.control)
    keys = jax.lax.bitcast_convert_type(control[:, KEY], jnp.uint32)
    shared_kv, prefix_tokens = prefix_kv(prefix), prefix_length(prefix)

    def unfinished(state: DecodeState) -> jax.Array:
        idle = jnp.sum(state.remaining == 0)
        within_limits = (idle < limits[0]) | (state.step < limits[1])
        return (state.step < shape.steps_per_call) & (idle < shape.slots) & within_limits

    def advance(state: DecodeState) -> DecodeState:
        busy = state.remaining > 0
        position = state.cache_position + prefix_tokens  # [B], in the sequence
        hidden, cache = forward(
            params,
            architecture,
            state.last_token[:, None],
            position[:, None],
            decode_setup(mesh, compute_dtype),
            prefix_kv=shared_kv,
            cache=CacheWrite(
                state.cache, jnp.where(busy, state.cache_position, -1)[:, None], key_limit=shape.key_limit
            ),
        )
        next_logits = logits(params, architecture, hidden[:, 0], compute_dtype)  # [B, V]
        possible = without(next_logits, shape.missing_ids)
        token = sample(possible, keys, position + 1, sampling, state.seen, mesh=mesh)  # [B]
        are_numbers = jnp.isfinite(jnp.max(next_logits, axis=-1))
        outputs = [jnp.where(busy, jnp.where(are_numbers, token, NOT_NUMBERS), -1)]
        if shape.logprobs:
            outputs.append(jax.lax.bitcast_convert_type(logprobs_of(next_logits, token), jnp.int32))
        ended = functools.reduce(jnp.logical_or, [token == eos for eos in shape.eos_ids], jnp.zeros_like(busy))
        remaining = jnp.where(ended, 0, state.remaining - 1)
        return DecodeState(
            step=state.step + 1,
            cache=constrain_cache(cache, mesh),
            last_token=jnp.where(busy, token, state.last_token),
            cache_position=state.cache_position + busy,
            remaining=jnp.where(busy, remaining, 0),
            seen=_mark_generated(state.seen, token, busy, mesh),
            sampled=state.sampled.at[:, :, state.step].set(jnp.stack(outputs)),
        )

    state = DecodeState(
        step=0,
        cache=slots.cache,
        last_token=control[:, LAST_TOKEN],
        cache_position=control[:, CACHE_POSITION],
        remaining=control[:, REMAINING],
        seen=slots.seen,
        sampled=jnp.full((2 if shape.logprobs else 1, shape.slots, shape.steps_per_call), -1, jnp.int32),
    )
    state = jax.lax.while_loop(unfinished, advance, state)
    columns = jnp.stack([state.last_token, state.cache_position, state.remaining], axis=1)
    control = jnp.concatenate([columns, control[:, KEY]], axis=1)
    return DeviceSlots(state.cache, constrain_rows(control, mesh), state.seen), replicate(state.sampled, mesh)


def _mark_generated(seen: jax.Array | None, token: jax.Array, busy: jax.Array, mesh: Mesh) -> jax.Array | None:
    """Returns `seen` with the tokens [B] of busy slots marked as generated."""
    if seen is None:
        return None
    rows, nowhere = jnp.arange(token.shape[0]), seen.shape[1]
    marked = jnp.take_along_axis(seen, token[:, None], axis=1)[:, 0] | jnp.uint8(GENERATED)
    return constrain_rows(seen.at[rows, jnp.where(busy, token, nowhere)].set(marked, mode="drop"), mesh)


def weight_formats(nominal: DecodeShape) -> Tree:
    """Returns how each parameter is stored while decoding: its sharding, on TPUs with a layout that the compiler chose.

    The compiler chooses it for the program of the nominal shape, and all programs of the model take the weights so.
    """
    if platform_of(nominal.mesh) == "tpu":
        return _compile_nominal(nominal).input_formats[0][0]
    return _weight_shardings(nominal)


# Without a bound, like jit's own caches: lengths and slots come in few sizes, so that a run has tens of shapes, and an
# evicted program would be lowered and compiled again in every iteration.
@functools.cache
def compile_decode_steps(shape: DecodeShape, nominal: DecodeShape) -> jax.stages.Compiled:
    """Compiles `decode_steps` once per process and shape, for weights stored as `weight_formats(nominal)`.

    The compiled program takes the arguments of `decode_steps` that are not static.
    """
    if shape.key_limit != nominal.key_limit and shape.reads_sequences_alone:
        return compile_decode_steps(replace(shape, key_limit=nominal.key_limit), nominal)
    if shape == nominal:
        return _compile_nominal(nominal)
    return lower_decode_steps(shape, weight_formats(nominal)).compile()


@functools.cache
def _compile_nominal(nominal: DecodeShape) -> jax.stages.Compiled:
    return lower_nominal(nominal).compile()


def clear_programs() -> None:
    """Drops the compiled decode programs of the process."""
    compile_decode_steps.cache_clear()
    _compile_nominal.cache_clear()


def lower_nominal(nominal: DecodeShape) -> jax.stages.Lowered:
    """Lowers the program of the nominal shape, on TPUs with layouts of the weights that the compiler chooses.

    It wants some weights transposed, and given another layout it would copy these in every call: 1.25 GiB per chip for
    Llama 3 70B on a v4-256, 4 % of its memory (planned).
    """
    formats = _weight_shardings(nominal)
    if platform_of(nominal.mesh) == "tpu":
        formats = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), formats)
    return lower_decode_steps(nominal, formats)


def lower_decode_steps(shape: DecodeShape, formats: Tree) -> jax.stages.Lowered:
    """Lowers `decode_steps`, also for absent devices. formats: sharding or format of each parameter."""
    architecture, mesh = shape.architecture, shape.mesh
    rows, everywhere = rows_sharding(mesh), replicated(mesh)
    cache = abstract_cache(architecture, shape.slots, shape.cache_length, shape.cache_dtype, mesh)
    cache_shardings = jax.tree.map(lambda _: cache_sharding(mesh), cache)
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    slots = DeviceSlots(
        cache,
        int32((shape.slots, CONTROL_COLUMNS)),
        jax.ShapeDtypeStruct((shape.slots, architecture.vocab_size), jnp.uint8) if shape.penalties else None,
    )
    slots_shardings = DeviceSlots(cache_shardings, rows, rows if shape.penalties else None)
    prefix = prefix_shardings = None
    if shape.prefix_length:
        prefix_cache = jax.eval_shape(lambda: init_cache(architecture, 1, shape.prefix_length, shape.compute_dtype))
        prefix = Prefix(prefix_cache, int32(()))
        kv_sharding = prefix_sharding(mesh)
        prefix_shardings = Prefix(KVCache(kv_sharding, kv_sharding), everywhere)
    return jax.jit(
        functools.partial(decode_steps, shape=shape),
        in_shardings=(formats, slots_shardings, rows, everywhere, everywhere, prefix_shardings),
        out_shardings=(slots_shardings, everywhere),
        donate_argnums=1,
    ).lower(
        abstract_weights(architecture, shape.weights_dtype, shape.compute_dtype),
        slots,
        int32((shape.slots, UPDATE_COLUMNS)),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), DeviceSamplingParams()),
        int32((2,)),
        prefix,
    )


def _weight_shardings(shape: DecodeShape) -> Tree:
    return param_shardings(weight_table(shape.architecture, shape.weights_dtype), shape.mesh, DECODE_RULES)
