"""One call of `generate`: slots are filled from a queue, longest prompt first, while the device runs chunks of steps.

Between two chunks the host reads one packed array, hands out what has finished, and refills. Where the device is not
the host's own processor, the next chunk is already on its way while the host does this.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import jax
import numpy as np

from isheep_jax.decode.cache import alignment, bucket_of, cache_length, data_shards, decode_activations
from isheep_jax.decode.capacity import FEWEST_SLOTS
from isheep_jax.decode.packing import empty_rows, fill, pack
from isheep_jax.decode.programs import (
    CHANGED,
    CONTROL_COLUMNS,
    KEY,
    LAST,
    PLACE,
    REMAINING,
    Slots,
    compile_decode_chunk,
    copy_slots,
    mark_prompts,
    new_slots,
    prefill,
    take_slots,
)
from isheep_jax.decode.requests import Completion, SamplingParams
from isheep_jax.decode.sampling import DeviceSamplingParams
from isheep_jax.decode.stops import cut_at_stop
from isheep_jax.decode.tokenization import TokenizedPrompt
from isheep_jax.model.attention_cached import cache_block

if TYPE_CHECKING:
    from isheep_jax.decode.engine import Engine

# While prompts wait, a chunk ends early once this share of the slots is idle: a slot left idle costs as much as a busy
# one, and reading back and refilling costs far less than the steps it would idle through.
_IDLE_SHARE = 1 / 8
# Where the next chunk is sent ahead, it runs at least so many steps, in which the host gets its work done.
_AHEAD_STEPS = 4
# Pairs of one call of `copy_slots`, on each data shard.
_COPIES = 8


class Generation:
    """The queue, and the host's view of every slot."""

    def __init__(self, engine: "Engine", prompts: Sequence[TokenizedPrompt], sampling: SamplingParams):
        """prompts: all with the same shared tokens."""
        self.engine = engine
        self.statistics = engine.statistics
        self.sampling = sampling
        # Decoded text does not show these.
        specials = (engine.tokenizer.special_id(string) for string in sampling.stop)
        self.stop_ids = frozenset(token for token in specials if token is not None)
        # Those that may take longest first, so that short ones fill the end.
        self.waiting = deque(sorted(prompts, key=lambda prompt: (-self._room(prompt), -len(prompt.own), prompt.id)))
        self.prefix = engine.prefix(self.waiting[0].shared)
        self.shards = data_shards(engine.mesh)
        self.on_cpu = decode_activations(engine.mesh).platform == "cpu"
        # As long as the longest may become, in few lengths.
        block = cache_block(decode_activations(engine.mesh).platform)
        longest = min(bucket_of(self._room(self.waiting[0]), block), engine.config.max_length)
        self.context = cache_length(-(-longest // block) * block)
        new = [self._most_new(prompt) for prompt in prompts]
        # More slots could not all be busy until the longest completion ends.
        self.slots = engine.slots(self.context, useful=sum(new) // max(new))
        while self._can_shrink(len(self.waiting)):
            self.slots //= 2
        self.statistics.slots = self.slots
        self.owner: list[TokenizedPrompt | None] = [None] * self.slots
        self.remaining = np.zeros(self.slots, np.int64)
        self.updates = np.zeros((self.slots, CONTROL_COLUMNS + 1), np.int32)
        self.written = np.zeros((self.slots, self.context), np.int32)  # new tokens of each slot
        self.logprobs = np.zeros(self.written.shape if sampling.logprobs else (self.slots, 0), np.float32)
        self.count = np.zeros(self.slots, np.int64)  # how many
        self.sent: deque[tuple[jax.Array, list[TokenizedPrompt | None]]] = (
            deque()
        )  # chunks on their way, and whose they are
        self.busy_at: float | None = time.perf_counter()  # when the devices last had work; None: they have some now

    def run(self) -> Iterator[list[Completion]]:
        """After each chunk of decode steps, what has finished."""
        engine, sampling = self.engine, self.sampling
        static = engine.static
        state = new_slots(
            static["architecture"],
            self.slots,
            self.context,
            engine.chunk_shape.cache_dtype,
            engine.mesh,
            penalties=sampling.has_penalties,
        )
        settings = DeviceSamplingParams(
            np.float32(sampling.temperature),
            np.float32(sampling.top_p),
            np.int32(sampling.top_k),
            np.float32(sampling.min_p),
            np.float32(sampling.repetition_penalty),
            np.float32(sampling.presence_penalty),
        )
        ahead = 0 if self.on_cpu else 1
        while self.waiting or any(self.owner) or self.sent:
            state = self._refill(self._shrink(state))
            if any(self.owner):
                limit = max(1, int(self.slots * _IDLE_SHARE)) if self.waiting else self.slots
                self._dispatches()
                state, drawn = self._program()(
                    engine.params,
                    state,
                    self.updates,
                    settings,
                    np.asarray([limit, ahead * _AHEAD_STEPS], np.int32),
                    self.prefix,
                )
                # Not in place: the program may still be reading it.
                self.updates = np.zeros_like(self.updates)
                self.sent.append((drawn, list(self.owner)))
            if len(self.sent) > ahead or not any(self.owner):
                yield list(self._collect(*self.sent.popleft()))

    def tokens(self, prompt: TokenizedPrompt) -> list[int]:
        """The new tokens so far of a prompt that is in a slot."""
        slot = next(slot for slot, owner in enumerate(self.owner) if owner is prompt)
        return self.written[slot, : self.count[slot]].tolist()

    def _program(self):
        slots = 0 if self.prefix is None else self.prefix.cache.length
        shape = replace(
            self.engine.chunk_shape,
            slots=self.slots,
            context=self.context,
            prefix=slots,
            penalties=self.sampling.has_penalties,
            logprobs=self.sampling.logprobs,
        )
        return compile_decode_chunk(shape, self.engine.chunk_shape)

    def _room(self, prompt: TokenizedPrompt) -> int:
        """Slots of the cache that a prompt may come to need."""
        return len(prompt.own) + self._most_new(prompt)

    def _most_new(self, prompt: TokenizedPrompt) -> int:
        wanted = prompt.max_tokens or self.sampling.max_tokens
        return min(wanted, self.engine.config.max_length - prompt.length)

    def _dispatches(self) -> None:
        """The host is about to send work: had the devices run out of it?"""
        if self.busy_at is not None:
            if all(drawn.is_ready() for drawn, _ in self.sent):
                self.statistics.idle_seconds += time.perf_counter() - self.busy_at
            self.busy_at = None

    def _can_shrink(self, busy: int) -> bool:
        # On a CPU a step costs arithmetic.
        half = self.slots // 2
        return self.on_cpu and self.shards == 1 and self.slots % 2 == 0 and busy <= half and half >= FEWEST_SLOTS

    def _shrink(self, state: Slots) -> Slots:
        """Fewer slots when the last prompts need no more."""
        busy = [slot for slot, owner in enumerate(self.owner) if owner is not None]
        while not self.waiting and self._can_shrink(len(busy)):
            idle = [slot for slot, owner in enumerate(self.owner) if owner is None]
            self.slots //= 2
            rows = np.asarray((busy + idle)[: self.slots], np.int32)
            self._dispatches()
            state = take_slots(state, rows, mesh=self.engine.mesh)
            self.owner = [self.owner[row] for row in rows]
            self.remaining, self.updates = self.remaining[rows], self.updates[rows]
            self.written, self.logprobs, self.count = self.written[rows], self.logprobs[rows], self.count[rows]
            busy = list(range(len(busy)))
        return state

    def _refill(self, state: Slots) -> Slots:
        """Gives waiting prompts to idle slots and prefills them; equal prompts are computed once."""
        admitted: list[list[int]] = [[] for _ in range(self.shards)]
        copies: list[list[tuple[int, int]]] = [[] for _ in range(self.shards)]
        first: dict[tuple[int, bytes], int] = {}
        new: list[int] = []
        for slot, owner in enumerate(self.owner):
            if not self.waiting:
                break
            if owner is None:
                prompt = self.waiting.popleft()
                self._admit(slot, prompt)
                new.append(slot)
                shard = slot * self.shards // self.slots
                leader = first.setdefault((shard, prompt.own.tobytes()), slot)
                if leader == slot:
                    admitted[shard].append(slot)
                else:
                    copies[shard].append((leader, slot))
        cache = self._prefill(state.cache, admitted)
        for group in zip_longest(*(_pieces(pairs, _COPIES) for pairs in copies), fillvalue=()):
            pairs = np.full((self.shards, _COPIES, 2), -1, np.int32)
            for shard, some in enumerate(group):
                if some:
                    pairs[shard, : len(some)] = some
            longest = max(len(self.owner[slot].own) for some in group for _, slot in some)
            length = min(bucket_of(longest, alignment(self.engine.mesh)), cache.length)
            cache = copy_slots(cache, pairs.reshape(-1, 2), length=length, mesh=self.engine.mesh)
        seen = state.seen if state.seen is None or not new else self._mark(state.seen, new)
        return state.replace(cache=cache, seen=seen)

    def _mark(self, seen: jax.Array, new: list[int]) -> jax.Array:
        """What the prompts of new slots hold, for the penalties."""
        longest = max(self.owner[slot].length for slot in new)
        tokens = np.full((self.slots, bucket_of(longest, alignment(self.engine.mesh))), seen.shape[1], np.int32)
        slots = np.full(self.slots, self.slots, np.int32)
        for row, slot in enumerate(new):
            owner = self.owner[slot]
            slots[row] = slot
            tokens[row, : owner.length] = [*owner.shared, *owner.own]
        return mark_prompts(seen, slots, tokens)

    def _admit(self, slot: int, prompt: TokenizedPrompt) -> None:
        self.owner[slot] = prompt
        self.count[slot] = 0
        self.remaining[slot] = self._most_new(prompt)
        update = self.updates[slot]
        update[LAST] = prompt.own[-1]
        update[PLACE] = len(prompt.own) - 1
        update[REMAINING] = self.remaining[slot]
        update[KEY] = prompt.key.view(np.int32)
        update[CHANGED] = 1

    def _prefill(self, cache, admitted: list[list[int]]):
        """Rows of prompts for each data shard, a row of each in a call."""
        engine, align = self.engine, alignment(self.engine.mesh)
        rows = [
            [(slots, row) for row in pack([len(self.owner[slot].own) for slot in slots], align)] for slots in admitted
        ]
        for each in rows:
            each.sort(key=lambda item: -item[1].used)
        for group in zip_longest(*rows):
            length = bucket_of(max(row.used for item in group if item for row in item[1:]), align)
            packed = empty_rows(self.shards, length)
            for shard, item in enumerate(group):
                if item:
                    slots, row = item
                    for segment, (index, begin) in enumerate(zip(row.prompts, row.begins), start=1):
                        slot = slots[index]
                        fill(packed[shard], begin, segment, self.owner[slot].own, slot)
                        self.statistics.prompt_tokens += len(self.owner[slot].own)
            self.statistics.prompt_room += self.shards * length
            self._dispatches()
            cache = prefill(engine.params, cache, packed, self.prefix, **engine.static)
        return cache

    def _collect(self, drawn: jax.Array, owners: list[TokenizedPrompt | None]) -> Iterator[Completion]:
        """Takes in a chunk's tokens [B, chunk] and hands out what has finished. owners: of the slots in that chunk."""
        told = np.asarray(drawn)
        self.busy_at = time.perf_counter()
        drawn = told[0]
        steps = int(np.count_nonzero((drawn >= 0).any(axis=0)))
        self.statistics.chunks += 1
        self.statistics.steps += steps
        self.statistics.slot_steps += steps * len(owners)
        # A chunk that was sent ahead goes on with what has finished in the meantime.
        mine = np.asarray([owner is not None and owner is now for owner, now in zip(owners, self.owner)])
        drawn = np.where(mine[:, None], drawn, -1)
        before = self.count.copy()
        row, step = np.nonzero(drawn >= 0)
        self.written[row, before[row] + step] = drawn[row, step]
        if self.sampling.logprobs:
            self.logprobs[row, before[row] + step] = told[1].view(np.float32)[row, step]
        new = np.count_nonzero(drawn >= 0, axis=1)
        self.statistics.drawn += int(new.sum())
        self.count += new
        last = self.written[np.arange(len(new)), np.maximum(self.count - 1, 0)]
        ended = (new > 0) & np.isin(last, self.engine.end_ids)
        self.remaining = np.where(ended, 0, self.remaining - new)
        for slot in np.flatnonzero(new):
            completion = self._completion(slot, before[slot], ended[slot])
            if completion is not None:
                if self.remaining[slot]:
                    self.updates[slot] = 0
                    self.updates[slot, CHANGED] = 1
                self.owner[slot] = None
                yield completion

    def _completion(self, slot: int, searched: int, ended: bool) -> Completion | None:
        """The slot's completion if a stop string, an end token or its length has ended it."""
        decode = self.engine.tokenizer.decode
        finished = self.remaining[slot] == 0
        if not (finished or self.sampling.stop):
            return None
        name = self.owner[slot].id
        tokens = self.written[slot, : self.count[slot] - ended].tolist()
        for place in range(searched, len(tokens)):
            if tokens[place] in self.stop_ids:
                tokens, ended, finished = tokens[:place], True, True
                break
        if self.sampling.stop and tokens:
            cut = cut_at_stop(decode, tokens, self.sampling.stop, int(searched))
            if cut is not None:
                text, kept = cut
                return Completion(name, text, tuple(tokens[:kept]), "stop", logprobs=self._logprobs(slot, kept))
        if not finished:
            return None
        finish, logprobs = "stop" if ended else "length", self._logprobs(slot, len(tokens))
        return Completion(name, decode(tokens), tuple(tokens), finish, logprobs=logprobs)

    def _logprobs(self, slot: int, count: int) -> tuple[float, ...]:
        return tuple(self.logprobs[slot, :count].tolist())


def _pieces(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
