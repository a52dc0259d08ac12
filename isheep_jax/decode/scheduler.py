"""Continuous batching: slots are filled from a queue of prompts, and refilled while others are still being decoded.

Between two calls of the decode program, which runs several steps of all slots, the host reads one small array, hands
out what has finished, and gives idle slots to waiting prompts. Where the devices are not the host's own processor, the
next call is already dispatched while the host does this.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import jax
import numpy as np

from isheep_jax.decode.cache import (
    alignment,
    bucket_of,
    cache_length,
    data_shards,
    replicated,
    rows_sharding,
)
from isheep_jax.decode.capacity import FEWEST_SLOTS
from isheep_jax.decode.device_slots import copy_rows, mark_prompts, new_slots, take_slots
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import pack, pack_batch
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.programs import compile_decode_steps
from isheep_jax.decode.requests import NOT_NUMBERS, Completion, SamplingParams
from isheep_jax.decode.sampling import DeviceSamplingParams
from isheep_jax.decode.slots import SlotTable
from isheep_jax.decode.stops import cut_at_stop
from isheep_jax.decode.tokenization import TokenizedPrompt
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.sharding import platform_of, put

# While prompts wait, a call ends early once this share of the slots is idle: an idle slot costs as much as a busy one,
# and reading back and refilling cost far less than the steps that it would idle through.
_IDLE_SHARE = 1 / 8
# A call that is dispatched ahead runs at least so many steps, in which the host gets its work done.
_STEPS_AHEAD = 4
# Pairs of rows in one call of `copy_rows`, on each data shard.
_COPIES = 8


class Scheduler:
    """Decodes prompts that share a prefix: one call of `Engine.generate`, or a part of it."""

    def __init__(self, model: LoadedModel, prompts: Sequence[TokenizedPrompt], sampling: SamplingParams):
        """Queues the prompts, which all have the same prefix, and chooses slots and cache length."""
        self._model = model
        self._sampling = sampling
        self._statistics = model.statistics
        self._shards = data_shards(model.mesh)
        self._align = alignment(model.mesh)
        self._rows, self._everywhere = rows_sharding(model.mesh), replicated(model.mesh)
        platform = platform_of(model.mesh)
        # Calls that are dispatched before the results of one are read. On a CPU program and host share the cores.
        self.calls_ahead = 0 if platform == "cpu" else 1
        # Decoded text leaves out special tokens, so those are looked for among the token ids.
        special_ids = (model.tokenizer.special_id(string) for string in sampling.stop)
        self._stop_ids = frozenset(token for token in special_ids if token is not None)
        # Longest first, so that short ones fill the gaps at the end.
        order = sorted(prompts, key=lambda p: (-self._max_cache_positions(p), -len(p.suffix), p.id))
        self._queue = deque(order)
        self._prefix = model.make_prefix(order[0].prefix)
        # Cache length for the longest prompt, bucketed so that few programs are compiled.
        block = cache_block(platform)
        longest = min(bucket_of(self._max_cache_positions(order[0]), block), model.config.max_length)
        self._cache_length = cache_length(-(-longest // block) * block)
        new_tokens = [self._max_new_tokens(prompt) for prompt in prompts]
        # More slots could not all be busy until the longest completion ends.
        slots = model.choose_slots(self._cache_length, useful=sum(new_tokens) // max(new_tokens))
        while self._can_halve(slots, len(order)):
            slots //= 2
        self._statistics.slots = slots
        self._table = SlotTable(slots, self._cache_length, logprobs=sampling.logprobs)
        # Calls whose results have not been read: their outputs, and the owners of the slots when they were dispatched.
        self._in_flight: deque[tuple[jax.Array, list[TokenizedPrompt | None]]] = deque()
        # When the devices last had work; None: they have some now.
        self._idle_since: float | None = time.perf_counter()

    def run(self) -> Iterator[list[Completion]]:
        """Yields what has finished after each call of the decode program."""
        table, sampling = self._table, self._sampling
        self._state = new_slots(
            self._model.architecture,
            len(table),
            self._cache_length,
            self._model.nominal_shape.cache_dtype,
            self._model.mesh,
            penalties=sampling.has_penalties,
        )
        params = put(DeviceSamplingParams.from_params(sampling), self._everywhere)
        while self._queue or table.busy or self._in_flight:
            self._shrink()
            self._refill()
            if table.busy:
                self._dispatch(params)
            if len(self._in_flight) > self.calls_ahead or not table.busy:
                yield list(self._collect())

    def tokens_of(self, prompt: TokenizedPrompt) -> list[int]:
        """Returns the new tokens so far of a prompt that is being decoded."""
        slot = next(slot for slot, owner in enumerate(self._table.owner) if owner is prompt)
        return self._table.tokens[slot, : self._table.count[slot]].tolist()

    def _dispatch(self, params: DeviceSamplingParams) -> None:
        """Calls the decode program."""
        table = self._table
        idle_limit = max(1, int(len(table) * _IDLE_SHARE)) if self._queue else len(table)
        limits = np.asarray([idle_limit, self.calls_ahead * _STEPS_AHEAD], np.int32)
        self._count_idle_time()
        self._state, outputs = self._program()(
            self._model.params,
            self._state,
            put(table.take_updates(), self._rows),
            params,
            put(limits, self._everywhere),
            self._prefix,
        )
        self._in_flight.append((outputs, list(table.owner)))

    def _program(self) -> jax.stages.Compiled:
        shape = replace(
            self._model.nominal_shape,
            slots=len(self._table),
            cache_length=self._cache_length,
            prefix_length=0 if self._prefix is None else self._prefix.cache.length,
            penalties=self._sampling.has_penalties,
            logprobs=self._sampling.logprobs,
        )
        return compile_decode_steps(shape, self._model.nominal_shape)

    def _max_cache_positions(self, prompt: TokenizedPrompt) -> int:
        """Returns the cache positions that a prompt needs if its completion has full length."""
        return len(prompt.suffix) + self._max_new_tokens(prompt)

    def _max_new_tokens(self, prompt: TokenizedPrompt) -> int:
        requested = prompt.max_tokens or self._sampling.max_tokens
        return min(requested, self._model.config.max_length - prompt.length)

    def _count_idle_time(self) -> None:
        """Adds the time since the last result to idle_seconds if no program was running."""
        if self._idle_since is not None:
            if all(outputs.is_ready() for outputs, _ in self._in_flight):
                self._statistics.idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

    def _can_halve(self, slots: int, prompts: int) -> bool:
        """Returns whether half of the slots are enough for so many prompts. On a CPU idle slots cost arithmetic.

        A call that is in flight has the old number of slots, so nothing may be dispatched ahead.
        """
        half = slots // 2
        can_shrink = self.calls_ahead == 0 and self._shards == 1
        return can_shrink and slots % 2 == 0 and prompts <= half and half >= FEWEST_SLOTS

    def _shrink(self) -> None:
        """Halves the slots as long as the last prompts fit in half of them."""
        table = self._table
        while not self._queue and self._can_halve(len(table), len(table.busy)):
            slots = np.asarray((table.busy + table.idle)[: len(table) // 2], np.int32)
            self._count_idle_time()
            self._state = take_slots(self._state, put(slots, self._everywhere), mesh=self._model.mesh)
            table.keep(slots)

    def _refill(self) -> None:
        """Gives idle slots to waiting prompts and prefills them; a data shard computes equal prompts once."""
        table = self._table
        admitted: list[list[int]] = [[] for _ in range(self._shards)]
        copies: list[list[tuple[int, int]]] = [[] for _ in range(self._shards)]
        first: dict[tuple[int, bytes], int] = {}
        new: list[int] = []
        for slot in table.idle[: len(self._queue)]:
            prompt = self._queue.popleft()
            table.admit(slot, prompt, self._max_new_tokens(prompt))
            new.append(slot)
            shard = slot * self._shards // len(table)
            source = first.setdefault((shard, prompt.suffix.tobytes()), slot)
            if source == slot:
                admitted[shard].append(slot)
            else:
                copies[shard].append((source, slot))
        cache = self._copy(self._prefill(self._state.cache, admitted), copies)
        seen = self._mark(self._state.seen, new) if new and self._state.seen is not None else self._state.seen
        self._state = self._state.replace(cache=cache, seen=seen)

    def _prefill(self, cache: KVCache, admitted: list[list[int]]) -> KVCache:
        """Prefills the prompts of the slots admitted to each data shard, one packed row of each shard in a call."""

        def suffix(slot: int) -> np.ndarray:
            return self._table.owner[slot].suffix

        rows: list[list[tuple[int, list[tuple[int, int]]]]] = []
        for slots in admitted:
            packed = pack([len(suffix(slot)) for slot in slots], self._align)
            shard = [(row.length, [(slots[i], begin) for i, begin in zip(row.prompts, row.begins)]) for row in packed]
            rows.append(sorted(shard, key=lambda row: -row[0]))
        for call in zip_longest(*rows, fillvalue=(0, [])):
            length = bucket_of(max(used for used, _ in call), self._align)
            batch = pack_batch([row for _, row in call], length, suffix, slot_of=lambda slot: slot)
            self._statistics.prompt_tokens += sum(len(suffix(slot)) for _, row in call for slot, _ in row)
            self._statistics.padded_prompt_tokens += self._shards * length
            self._count_idle_time()
            tokens = put(batch.tokens, self._rows)
            cache = prefill(self._model.params, cache, tokens, self._prefix, **self._model.static_args)
        return cache

    def _copy(self, cache: KVCache, copies: list[list[tuple[int, int]]]) -> KVCache:
        """Copies the cache rows of equal prompts. copies: for each data shard, slots to copy from and to."""
        for group in zip_longest(*(_chunks(pairs, _COPIES) for pairs in copies), fillvalue=()):
            pairs = np.full((self._shards, _COPIES, 2), -1, np.int32)
            for shard, shard_pairs in enumerate(group):
                if shard_pairs:
                    pairs[shard, : len(shard_pairs)] = shard_pairs
            longest = max(len(self._table.owner[slot].suffix) for shard_pairs in group for _, slot in shard_pairs)
            length = min(bucket_of(longest, self._align), cache.length)
            pairs = put(pairs.reshape(-1, 2), self._rows)
            cache = copy_rows(cache, pairs, length=length, mesh=self._model.mesh)
        return cache

    def _mark(self, seen: jax.Array, new: list[int]) -> jax.Array:
        """Returns `seen` with the prompts of new slots marked, for the penalties."""
        owner, count = self._table.owner, len(self._table)
        longest = max(owner[slot].length for slot in new)
        tokens = np.full((count, bucket_of(longest, self._align)), seen.shape[1], np.int32)
        slots = np.full(count, count, np.int32)
        for row, slot in enumerate(new):
            slots[row] = slot
            tokens[row, : owner[slot].length] = [*owner[slot].prefix, *owner[slot].suffix]
        return mark_prompts(seen, put(slots, self._everywhere), put(tokens, self._everywhere))

    def _collect(self) -> Iterator[Completion]:
        """Reads the results of the oldest call and yields what has finished."""
        on_device, owners = self._in_flight.popleft()
        outputs = jax.device_get(on_device)
        self._idle_since = time.perf_counter()
        steps = int(np.count_nonzero((outputs[0] >= 0).any(axis=0)))
        new, ended, failed = self._table.append(outputs, owners, self._model.eos_ids)
        self._statistics.calls += 1
        self._statistics.steps += steps
        self._statistics.slot_steps += steps * len(owners)
        self._statistics.sampled_tokens += int(new.sum())
        for slot in np.flatnonzero(new.astype(bool) | failed):
            if failed[slot]:
                completion = Completion(self._table.owner[slot].id, "", finish_reason="error", error=NOT_NUMBERS)
            else:
                completion = self._completion(slot, int(self._table.count[slot] - new[slot]), bool(ended[slot]))
            if completion is not None:
                self._table.release(slot)
                yield completion

    def _completion(self, slot: int, searched: int, ended: bool) -> Completion | None:
        """Returns the slot's completion if a stop string, an end token or its length has ended it.

        searched: how many tokens are known to hold no stop string. ended: whether the last token is an end token.
        """
        decode, stop = self._model.tokenizer.decode, self._sampling.stop
        finished = self._table.remaining[slot] == 0
        if not (finished or stop):
            return None
        tokens = self._table.tokens[slot, : self._table.count[slot] - ended].tolist()
        index = next((i for i in range(searched, len(tokens)) if tokens[i] in self._stop_ids), None)
        if index is not None:
            tokens, ended, finished = tokens[:index], True, True
        if stop and tokens:
            cut = cut_at_stop(decode, tokens, stop, searched)
            if cut is not None:
                text, kept, string = cut
                return self._result(slot, text, tokens[:kept], "stop", string)
        if not finished:
            return None
        return self._result(slot, decode(tokens), tokens, "stop" if ended else "length")

    def _result(self, slot: int, text: str, tokens: list[int], finish_reason: str, stop: str = "") -> Completion:
        logprobs = tuple(self._table.logprobs[slot, : len(tokens)].tolist())
        return Completion(self._table.owner[slot].id, text, tuple(tokens), finish_reason, logprobs=logprobs, stop=stop)


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
