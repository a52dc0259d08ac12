"""Continuous batching: slots are filled from a queue of prompts, and refilled while others are still being decoded.

Between two calls of the decode program, which runs several steps of all slots, the host reads one small array, hands
out what has finished, and gives idle slots to waiting prompts. Where the devices are not the host's own processor, the
next call is already dispatched while the host does this. The schedule touches devices only through `Calls`, so that it
can be replayed without any.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from isheep_jax import profiling
from isheep_jax.decode.cache import Sizing
from isheep_jax.decode.capacity import FEWEST_SLOTS
from isheep_jax.decode.packing import pack, pack_batch
from isheep_jax.decode.queue import PromptQueue
from isheep_jax.decode.requests import NOT_NUMBERS, Completion, SamplingParams
from isheep_jax.decode.slots import SlotTable
from isheep_jax.decode.statistics import Statistics
from isheep_jax.decode.stops import cut_at_stop, holds_stop, lookback
from isheep_jax.decode.tokenization import TokenizedPrompt

# While prompts wait, a call ends early once this share of the slots is idle: an idle slot costs as much as a busy one,
# and reading back and refilling cost far less than the steps that it would idle through.
_IDLE_SHARE = 1 / 8
# Fewer idle slots than this share are not refilled yet, but on CPUs: their prompts would be a call of mostly padding.
_REFILL_SHARE = 1 / 16
# A call that is dispatched ahead runs at least so many steps, in which the host gets its work done.
_STEPS_AHEAD = 4
# Pairs of rows in one call of `Calls.copy`, on each data shard.
_COPIES = 8
# Prompts that are known before the number of slots is chosen, where that follows from them; no CPU has so many slots.
_KNOWN_PROMPTS = 1024
# Elsewhere than on a CPU fewer slots are another program to compile, which pays if the longest completion may have so
# many steps left, and if a step then moves so much less memory. A kernel that reads each sequence alone reads no idle
# slot; there activations and what devices exchange become less: with a quarter of the slots and as many keys a step
# takes 26 to 36 % less (forecast for Llama 3 70B on a v4-256 and 8B on a v5e-16).
_STEPS_LEFT = 128
_SAVED_SHARE = 1 / 5
# Fewest slots of a data shard there: a tile has so many rows.
_LEAST_SLOTS = 8


class Calls(Protocol):
    """The slots on the devices; see `device_calls.DeviceCalls`."""

    def prefill(self, packed: np.ndarray) -> None: ...
    def copy(self, pairs: np.ndarray, length: int) -> None: ...
    def mark(self, slots: np.ndarray, tokens: np.ndarray) -> None: ...
    def decode(self, updates: np.ndarray, limits: np.ndarray, positions: int) -> Any: ...
    def read(self, outputs: Any) -> np.ndarray: ...
    def is_done(self, outputs: Any) -> bool: ...
    def keep(self, slots: np.ndarray) -> None: ...


class Tokenizer(Protocol):
    """What the schedule needs of `isheep_jax.text.tokenizer.Tokenizer`."""

    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str: ...
    def special_id(self, text: str) -> int | None: ...


class ScheduledModel(Protocol):
    """What the schedule needs of `loaded.LoadedModel`.

    max_length: the most tokens of a prompt with what follows it.
    rows: of the logits, V.
    slots: how many the settings ask for; 0: as many as fit in memory.
    steps_per_call: decode steps of a call.
    step_bytes: what a decode step reads on a device: bytes of the weights, and of each cache position of a slot.
    """

    sizing: Sizing
    max_length: int
    rows: int
    slots: int
    steps_per_call: int
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    statistics: Statistics
    step_bytes: tuple[float, float]

    def choose_slots(self, cache_length: int, useful: int) -> int: ...


# Makes idle slots from a model, the shared prefix, the number of slots, the cache length and the sampling parameters.
OpenSlots = Callable[[Any, tuple[int, ...], int, int, SamplingParams], Calls]


class Scheduler:
    """Decodes the prompts of a queue up to the first with another prefix, or too long for the cache rows."""

    def __init__(self, model: ScheduledModel, queue: PromptQueue, sampling: SamplingParams, open_slots: OpenSlots):
        """Chooses slots and cache length by the prompts that are known, of which there must be one."""
        self._open_slots = open_slots
        self._model = model
        self._queue = queue
        self._sampling = sampling
        self._statistics = model.statistics
        self._sizing = model.sizing
        self.calls_ahead = model.sizing.calls_ahead
        # Decoded text leaves out special tokens, so those are looked for among the token ids.
        special_ids = (model.tokenizer.special_id(string) for string in sampling.stop)
        self._stop_ids = [token for token in special_ids if token is not None]
        self._lookback = lookback(sampling.stop)
        queue.fill(known_prompts(model))
        known = queue.same_prefix()
        self._prefix = known[0].prefix
        self._max_positions = model.max_length - len(self._prefix)
        more = not queue.is_exhausted or len(known) < len(queue.pending)
        longest = max(map(self._cache_positions, known))
        self._cache_length = self._sizing.cache_length(
            longest, self._max_positions, more=more, slots_given=model.slots > 0
        )
        new_tokens = [self._max_new_tokens(prompt) for prompt in known]
        # More slots could not all be busy until the longest completion ends.
        slots = model.choose_slots(self._cache_length, useful=sum(new_tokens) // max(new_tokens))
        while not more and self._sizing.platform == "cpu" and self._is_enough(slots // 2, slots, len(known)):
            slots //= 2
        self._statistics.slots = slots
        self._table = SlotTable(slots, self._cache_length, logprobs=sampling.logprobs)
        # Calls whose results have not been read: their outputs, and the tenants of the slots when they were dispatched.
        self._in_flight: deque[tuple[Any, np.ndarray]] = deque()
        # When the devices last had work; None: they have some now.
        self._idle_since: float | None = time.perf_counter()

    def run(self) -> Iterator[list[Completion]]:
        """Yields what has finished after each call of the decode program.

        Ends when the queue's next prompt does not fit in these slots, or when none is known and all slots are idle.
        """
        table, started = self._table, time.perf_counter()
        waited = 0.0
        self._calls = self._open_slots(self._model, self._prefix, len(table), self._cache_length, self._sampling)
        try:
            while True:
                self._refill()
                # Calls in flight have the old number of slots.
                fewer = self._fewer_slots()
                if fewer and not self._in_flight:
                    self._shrink(fewer)
                    fewer = 0
                if table.busy and not fewer:
                    self._dispatch()
                if not self._in_flight:
                    return
                if len(self._in_flight) > self.calls_ahead or not table.busy or fewer:
                    outputs, tenants = self._in_flight.popleft()
                    begun = time.perf_counter()
                    sampled = self._calls.read(outputs)
                    waited += time.perf_counter() - begun
                    yield list(self._collect(sampled, tenants))
        finally:
            seconds = time.perf_counter() - started
            self._statistics.generate_seconds += seconds
            self._statistics.host_seconds += seconds - waited

    def tokens_of(self, prompt: TokenizedPrompt) -> list[int]:
        """Returns the new tokens so far of a prompt that is being decoded."""
        slot = next(slot for slot, owner in enumerate(self._table.owner) if owner is prompt)
        return self._table.tokens[slot, : self._table.count[slot]].tolist()

    def _fits(self, prompt: TokenizedPrompt) -> bool:
        return prompt.prefix == self._prefix and self._cache_positions(prompt) <= self._cache_length

    def _cache_positions(self, prompt: TokenizedPrompt) -> int:
        """Returns the cache positions that a prompt needs if its completion has full length."""
        return len(prompt.suffix) + self._max_new_tokens(prompt)

    def _max_new_tokens(self, prompt: TokenizedPrompt) -> int:
        requested = prompt.max_tokens or self._sampling.max_tokens
        return min(requested, self._model.max_length - prompt.length)

    @property
    def _next_waits(self) -> bool:
        """Whether a prompt is known that waits for one of these slots."""
        head = self._queue.head
        return head is not None and self._fits(head)

    def _dispatch(self) -> None:
        """Calls the decode program."""
        table = self._table
        idle_limit = max(1, int(len(table) * _IDLE_SHARE)) if self._next_waits else len(table)
        limits = np.asarray([idle_limit, self.calls_ahead * _STEPS_AHEAD], np.int32)
        self._count_idle_time()
        profiling.step()
        # Steps of calls in flight are not counted in the table yet.
        steps = self._model.steps_per_call * (len(self._in_flight) + 1)
        outputs = self._calls.decode(table.take_updates(), limits, table.longest(steps))
        self._in_flight.append((outputs, table.tenant.copy()))

    def _count_idle_time(self) -> None:
        """Adds the time since the last result to idle_seconds if no program was running."""
        if self._idle_since is not None:
            if all(self._calls.is_done(outputs) for outputs, _ in self._in_flight):
                self._statistics.idle_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

    def _fewer_slots(self) -> int:
        """Returns a number of slots that the busy ones fit in, if it is cheaper; 0 if the slots stay as they are."""
        table = self._table
        if self._next_waits or not table.busy:
            return 0
        busy = self._busiest_shard() * self._sizing.shards
        if self._sizing.platform == "cpu":  # where idle slots cost arithmetic, and programs compile in seconds
            half = len(table) // 2
            return half if self._is_enough(half, len(table), busy) else 0
        quarter = len(table) // 4
        if not self._is_enough(quarter, len(table), busy):
            return 0
        weights, position = self._model.step_bytes
        cache = position * table.longest(0)
        pays = cache * (len(table) - quarter) >= _SAVED_SHARE * (weights + cache * len(table))
        return quarter if pays and int(table.remaining[table.busy].max()) >= _STEPS_LEFT else 0

    def _is_enough(self, fewer: int, slots: int, busy: int) -> bool:
        """Returns whether `fewer` slots, a divisor of the slots, hold `busy` prompts and are not too few."""
        shards = self._sizing.shards
        least = FEWEST_SLOTS if self._sizing.platform == "cpu" else _LEAST_SLOTS
        return fewer > 0 and slots % fewer == 0 and fewer % shards == 0 and busy <= fewer and fewer >= least * shards

    def _busiest_shard(self) -> int:
        """Returns how many slots are busy on the data shard that has the most."""
        return int(np.count_nonzero(self._table.tenant.reshape(self._sizing.shards, -1), axis=1).max())

    def _shard(self, slot: int) -> int:
        """Returns the data shard that holds a slot."""
        return slot * self._sizing.shards // len(self._table)

    def _shrink(self, count: int) -> None:
        """Moves the busy slots to `count` slots, on their data shards."""
        table, shards = self._table, self._sizing.shards
        kept: list[int] = []
        for shard in range(shards):
            own = range(shard * len(table) // shards, (shard + 1) * len(table) // shards)
            busy_first = sorted(own, key=lambda slot: table.owner[slot] is None)
            kept += busy_first[: count // shards]
        slots = np.asarray(kept, np.int32)
        self._count_idle_time()
        self._calls.keep(slots)
        table.keep(slots)

    def _refill(self) -> None:
        """Gives idle slots to waiting prompts and prefills them; a data shard computes equal prompts once."""
        idle = self._table.idle
        self._queue.fill(max(len(idle), self._few) + 1)
        new: list[TokenizedPrompt] = []
        if self._table.busy and len(idle) < min(self._few, len(self._queue.pending)):
            return
        while len(new) < len(idle) and self._next_waits:
            new.append(self._queue.take())
        if not new:
            return
        admitted: list[list[int]] = [[] for _ in range(self._sizing.shards)]
        copies: list[list[tuple[int, int]]] = [[] for _ in range(self._sizing.shards)]
        slots = []
        for prompt, slot, source in self._deal(new, idle):
            self._table.admit(slot, prompt, self._max_new_tokens(prompt))
            slots.append(slot)
            if source is None:
                admitted[self._shard(slot)].append(slot)
            else:
                copies[self._shard(slot)].append((source, slot))
        self._prefill(admitted)
        self._copy(copies)
        if self._sampling.has_penalties:
            self._mark(slots)

    @property
    def _few(self) -> int:
        """How many idle slots are too few to refill while others are busy: their prompts would not fill a row."""
        return 0 if self._sizing.platform == "cpu" else int(len(self._table) * _REFILL_SHARE)

    def _deal(
        self, prompts: Sequence[TokenizedPrompt], idle: Sequence[int]
    ) -> Iterator[tuple[TokenizedPrompt, int, int | None]]:
        """Yields each prompt with its slot, and a slot of the same shard that has an equal prompt or None.

        Every shard computes rows of the same length in a call, so that each gets about as many tokens: the longest
        prompt that is left goes to the shard with the fewest so far.
        """
        shards = self._sizing.shards
        free: list[list[int]] = [[] for _ in range(shards)]
        for slot in reversed(idle):
            free[self._shard(slot)].append(slot)
        tokens = [0] * shards
        first: dict[bytes, list[int]] = {}  # slots with the same prompt, on different shards
        for prompt in sorted(prompts, key=lambda prompt: -len(prompt.suffix)):
            equal = first.setdefault(prompt.suffix.tobytes(), [])
            source = next((slot for slot in equal if free[self._shard(slot)]), None)
            if source is not None:
                yield prompt, free[self._shard(source)].pop(), source
                continue
            # Of equal ones that with the most idle slots, so that the last prompts are spread as well.
            shard = min(filter(free.__getitem__, range(shards)), key=lambda s: (tokens[s], -len(free[s])))
            slot = free[shard].pop()
            equal.append(slot)
            tokens[shard] += self._sizing.aligned(len(prompt.suffix))
            yield prompt, slot, None

    def _prefill(self, admitted: list[list[int]]) -> None:
        """Prefills the prompts of the slots admitted to each data shard, one packed row of each shard in a call."""

        def suffix(slot: int) -> np.ndarray:
            return self._table.owner[slot].suffix

        sizing = self._sizing
        rows: list[list[tuple[int, list[tuple[int, int]]]]] = []
        # The shards' rows have the same length in a call.
        fullest = max(sum(sizing.aligned(len(suffix(slot))) for slot in slots) for slots in admitted)
        for slots in admitted:
            packed = pack([len(suffix(slot)) for slot in slots], sizing, fullest)
            shard = [(row.length, [(slots[i], begin) for i, begin in zip(row.prompts, row.begins)]) for row in packed]
            rows.append(sorted(shard, key=lambda row: -row[0]))
        for call in zip_longest(*rows, fillvalue=(0, [])):
            length = sizing.row_length(max(used for used, _ in call))
            batch = pack_batch([row for _, row in call], length, suffix, slot_of=lambda slot: slot)
            self._statistics.prompt_tokens += sum(len(suffix(slot)) for _, row in call for slot, _ in row)
            self._statistics.padded_prompt_tokens += sizing.shards * length
            self._count_idle_time()
            self._calls.prefill(batch.tokens)

    def _copy(self, copies: list[list[tuple[int, int]]]) -> None:
        """Copies the cache rows of equal prompts. copies: for each data shard, slots to copy from and to."""
        for group in zip_longest(*(_chunks(pairs, _COPIES) for pairs in copies), fillvalue=()):
            pairs = np.full((self._sizing.shards, _COPIES, 2), -1, np.int32)
            for shard, shard_pairs in enumerate(group):
                if shard_pairs:
                    pairs[shard, : len(shard_pairs)] = shard_pairs
            longest = max(len(self._table.owner[slot].suffix) for shard_pairs in group for _, slot in shard_pairs)
            self._calls.copy(pairs.reshape(-1, 2), self._sizing.row_length(longest))

    def _mark(self, new: list[int]) -> None:
        """Notes the prompts of new slots for the penalties."""
        owner, count = self._table.owner, len(self._table)
        longest = max(owner[slot].length for slot in new)
        tokens = np.full((count, self._sizing.row_length(longest)), self._model.rows, np.int32)
        slots = np.full(count, count, np.int32)
        for row, slot in enumerate(new):
            slots[row] = slot
            tokens[row, : owner[slot].length] = [*owner[slot].prefix, *owner[slot].suffix]
        self._calls.mark(slots, tokens)

    def _collect(self, sampled: np.ndarray, tenants: np.ndarray) -> Iterator[Completion]:
        """Takes in the results of a call and yields what has finished.

        sampled: [1 or 2, B, steps], its outputs. tenants: of the slots when it was dispatched.
        """
        self._idle_since = time.perf_counter()
        steps = int(np.count_nonzero((sampled[0] >= 0).any(axis=0)))
        new, ended, failed = self._table.append(sampled, tenants, self._model.eos_ids)
        self._statistics.calls += 1
        self._statistics.steps += steps
        self._statistics.slot_steps += steps * len(tenants)
        self._statistics.sampled_tokens += int(new.sum())
        # The text of others is looked at for stop strings alone.
        due = (new > 0) if self._sampling.stop else (new > 0) & (self._table.remaining == 0)
        for slot in np.flatnonzero(due | failed):
            if failed[slot]:
                completion = Completion(self._table.owner[slot].id, "", finish_reason="error", error=NOT_NUMBERS)
            else:
                completion = self._completion(slot, int(self._table.count[slot] - new[slot]), bool(ended[slot]))
            if completion is not None:
                self._table.release(slot)
                yield completion

    def _completion(self, slot: int, searched: int, ended: bool) -> Completion | None:
        """Returns the slot's completion if a stop string, an end token or its length has ended it.

        searched: how many tokens were searched for stop strings. ended: whether the last token is an end token.
        """
        decode, stop = self._model.tokenizer.decode, self._sampling.stop
        finished = self._table.remaining[slot] == 0
        if not (finished or stop):
            return None
        row = self._table.tokens[slot, : self._table.count[slot] - ended]
        if self._stop_ids and (special := np.flatnonzero(np.isin(row[searched:], self._stop_ids))).size:
            row, ended, finished = row[: searched + special[0]], True, True
        if not finished and not holds_stop(decode(row[max(0, searched - self._lookback) :].tolist()), stop):
            return None
        tokens = row.tolist()
        if stop and tokens and (cut := cut_at_stop(decode, tokens, stop)):
            text, kept, string = cut
            return self._result(slot, text, tokens[:kept], "stop", string)
        if not finished:
            return None
        return self._result(slot, decode(tokens), tokens, "stop" if ended else "length")

    def _result(self, slot: int, text: str, tokens: list[int], finish_reason: str, stop: str = "") -> Completion:
        logprobs = tuple(self._table.logprobs[slot, : len(tokens)].tolist())
        return Completion(self._table.owner[slot].id, text, tuple(tokens), finish_reason, logprobs=logprobs, stop=stop)


def known_prompts(model: ScheduledModel) -> int:
    """Returns how many prompts of a queue should be known before slots are chosen: one more than there are slots."""
    return (model.slots or _KNOWN_PROMPTS) + 1


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
