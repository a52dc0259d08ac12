"""The slots on the devices, and the calls that change them, one after the other."""

from dataclasses import replace

import jax
import numpy as np

from isheep_jax.decode.cache import replicated, rows_sharding
from isheep_jax.decode.device_slots import copy_rows, mark_prompts, new_slots, take_slots
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.programs import compile_decode_steps
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.decode.sampling import DeviceSamplingParams
from isheep_jax.sharding import put


class DeviceCalls:
    """Slots of one cache length for prompts that share a prefix. All calls return before the devices have done them."""

    def __init__(
        self, model: LoadedModel, prefix: tuple[int, ...], slots: int, cache_length: int, sampling: SamplingParams
    ):
        """Allocates idle slots and prefills the prefix.

        Args:
            model: the weights.
            prefix: tokens that all prompts begin with.
            slots: B.
            cache_length: tokens that a cache row must hold.
            sampling: sampling parameters of all slots.
        """
        self._model = model
        self._rows, self._everywhere = rows_sharding(model.mesh), replicated(model.mesh)
        self._prefix = model.make_prefix(prefix)
        self._params = put(DeviceSamplingParams.from_params(sampling), self._everywhere)
        self._shape = replace(
            model.nominal_shape,
            slots=slots,
            cache_length=cache_length,
            prefix_length=0 if self._prefix is None else self._prefix.cache.length,
            penalties=sampling.has_penalties,
            logprobs=sampling.logprobs,
        )
        self._state = new_slots(
            model.architecture,
            slots,
            cache_length,
            model.nominal_shape.cache_dtype,
            model.mesh,
            penalties=sampling.has_penalties,
        )

    def prefill(self, packed: np.ndarray) -> None:
        """Prefills packed prompts [R, T, 4] int32 (see `packing`), rows of which belong to consecutive data shards."""
        cache = prefill(
            self._model.params, self._state.cache, put(packed, self._rows), self._prefix, **self._model.static_args
        )
        self._state = self._state.replace(cache=cache)

    def copy(self, pairs: np.ndarray, length: int) -> None:
        """Copies the first `length` positions of cache rows; pairs [R, 2] int32 as in `device_slots.copy_rows`."""
        pairs = put(pairs, self._rows)
        cache = copy_rows(self._state.cache, pairs, length=min(length, self._state.cache.length), mesh=self._model.mesh)
        self._state = self._state.replace(cache=cache)

    def mark(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Notes the tokens of new prompts for the penalties; slots [A], tokens [A, T] as in `mark_prompts`."""
        seen = mark_prompts(self._state.seen, put(slots, self._everywhere), put(tokens, self._everywhere))
        self._state = self._state.replace(seen=seen)

    def decode(self, updates: np.ndarray, limits: np.ndarray, positions: int) -> jax.Array:
        """Dispatches a call of the decode program, and returns its outputs, which are not there yet.

        Args:
            updates: [B, 6] int32, new control of some slots.
            limits: [2] int32, when the call ends early; see `programs.decode_steps`.
            positions: most cache positions that a sequence may hold when the call ends.
        """
        shape = replace(self._shape, key_limit=self._model.sizing.key_limit(positions))
        program = compile_decode_steps(shape, self._model.nominal_shape)
        self._state, outputs = program(
            self._model.params,
            self._state,
            put(updates, self._rows),
            self._params,
            put(limits, self._everywhere),
            self._prefix,
        )
        return outputs

    def read(self, outputs: jax.Array) -> np.ndarray:
        """Waits for the outputs of a call, [1 or 2, B, steps] int32."""
        return jax.device_get(outputs)

    def is_done(self, outputs: jax.Array) -> bool:
        """Returns whether the outputs of a call are there."""
        return outputs.is_ready()

    def keep(self, slots: np.ndarray) -> None:
        """Drops all slots but the given [B'] int32, those of each data shard together and equally many of each."""
        self._state = take_slots(self._state, put(slots, self._rows), mesh=self._model.mesh)
        self._shape = replace(self._shape, slots=len(slots))
