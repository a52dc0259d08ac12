"""Replays the engine's own schedule without devices: on prompts and completions of supposed lengths."""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from isheep_jax.decode.cache import Sizing
from isheep_jax.decode.device_slots import CACHE_POSITION, CHANGED, KEY, REMAINING
from isheep_jax.decode.prefill_logprobs import PackedRows, input_windows
from isheep_jax.decode.queue import PromptQueue, longest_first, windows
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.decode.scheduler import Scheduler
from isheep_jax.decode.statistics import Statistics
from isheep_jax.decode.tokenization import TokenizedPrompt
from isheep_jax.planning.schedule import Demand, Generation, Scoring, StageSchedule, Training

# Any token, and one that ends a completion.
_TOKEN, _END = 2, 1
# Averages of cache positions are rounded to multiples of this, so that few are counted.
_RESOLUTION = 32


@dataclass(frozen=True)
class _Silent:
    """A tokenizer for texts that nobody reads."""

    vocab_size: int = 3

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def special_id(self, text: str) -> int | None:
        return None


@dataclass(frozen=True)
class SupposedModel:
    """What a schedule needs to know of a model that is not there, and counts of the calls that it asks for.

    sizing: what decides the sizes of arrays.
    max_length, slots, steps_per_call: settings of decoding; slots must be given.
    step_bytes: what a decode step reads on a device: bytes of the weights, and of each cache position of a slot.
    read_block: cache positions that attention reads at a time.
    reads_sequences_alone: whether each sequence is read as far as it goes, not as far as the longest.
    tokenizer: decodes the tokens `text`, which completions repeat.
    """

    sizing: Sizing
    max_length: int
    slots: int
    steps_per_call: int
    step_bytes: tuple[float, float]
    read_block: int = 512
    reads_sequences_alone: bool = False
    rows: int = 3
    eos_ids: tuple[int, ...] = (_END,)
    tokenizer: object = _Silent()
    text: np.ndarray = field(default_factory=lambda: np.array([_TOKEN], np.int32))
    statistics: Statistics = field(default_factory=Statistics)
    decode: Counter[tuple[int, int]] = field(default_factory=Counter)
    prefill: Counter[int] = field(default_factory=Counter)

    def choose_slots(self, cache_length: int, useful: int) -> int:
        return self.slots

    def positions_read(self, last: np.ndarray, slots: int) -> int:
        """Returns the cache positions that attention reads of each slot on average.

        Args:
            last: cache position of the new token of each busy slot.
            slots: all of them.
        """
        if not self.reads_sequences_alone:
            return -(-int(last.max() + 1) // self.read_block) * self.read_block
        read = float((-(-last // self.read_block) * self.read_block).sum()) / slots
        return round(read / _RESOLUTION) * _RESOLUTION


class SupposedCalls:
    """Slots that sample as many tokens as a prompt's key says, in place of `device_calls.DeviceCalls`."""

    def __init__(
        self, model: SupposedModel, prefix: tuple[int, ...], slots: int, cache_length: int, sampling: SamplingParams
    ):
        self._model = dataclasses.replace(model, read_block=min(model.read_block, cache_length))
        # Tokens of each slot that are left until its end or its limit, and the cache positions that it has.
        self._left, self._limit, self._position = (np.zeros(slots, np.int64) for _ in range(3))
        if prefix:
            model.prefill[model.sizing.row_length(len(prefix))] += 1

    def prefill(self, packed: np.ndarray) -> None:
        self._model.prefill[packed.shape[1]] += 1

    def copy(self, pairs: np.ndarray, length: int) -> None: ...

    def mark(self, slots: np.ndarray, tokens: np.ndarray) -> None: ...

    def decode(self, updates: np.ndarray, limits: np.ndarray, positions: int) -> np.ndarray:
        changed = updates[:, CHANGED] > 0
        self._limit[changed] = updates[changed, REMAINING]
        self._left[changed] = np.minimum(updates[changed, KEY.start], self._limit[changed])
        self._position[changed] = updates[changed, CACHE_POSITION]
        size, most = len(self._left), self._model.steps_per_call
        ends = np.sort(self._left)
        steps = 0
        while steps < most:
            idle = int(np.searchsorted(ends, steps, side="right"))
            if idle == size or (idle >= limits[0] and steps >= limits[1]):
                break
            last = self._position[self._left > steps] + steps
            self._model.decode[size, self._model.positions_read(last, size)] += 1
            steps += 1
        step = np.arange(most)
        sampled = np.where((step < self._left[:, None]) & (step < steps), np.resize(self._model.text, most), -1).astype(
            np.int32
        )
        ended = np.flatnonzero((self._left > 0) & (self._left <= steps) & (self._left < self._limit))
        sampled[ended, self._left[ended] - 1] = _END
        done = np.minimum(self._left, steps)
        self._left, self._limit, self._position = self._left - done, self._limit - done, self._position + done
        return sampled[None]

    def read(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def is_done(self, outputs: np.ndarray) -> bool:
        return True

    def keep(self, slots: np.ndarray) -> None:
        self._left, self._limit, self._position = (x[slots] for x in (self._left, self._limit, self._position))


def _prompt(number: int, tokens: int) -> np.ndarray:
    """Returns a prompt that is like no other, [tokens] int32."""
    prompt = np.full(tokens, _TOKEN, np.int32)
    prompt[:1] = number
    return prompt


def replay_generation(
    demand: Generation,
    model: SupposedModel,
    sampling: SamplingParams | None = None,
    scheduler: type[Scheduler] = Scheduler,
    calls: type[SupposedCalls] = SupposedCalls,
) -> StageSchedule:
    """Returns the calls that the engine makes for one call of `generate`.

    Args:
        demand: lengths of prompts and completions.
        model: as the schedule sees it.
        sampling: parameters besides the limit of tokens; None: no stop strings.
        scheduler: the schedule.
        calls: what stands in for the devices.
    """
    prefix = (_TOKEN,) * demand.prefix
    prompts = [
        TokenizedPrompt(f"{i:06d}", prefix, _prompt(i, tokens), np.array([new, 0], np.uint32), 0)
        for i, (tokens, new) in enumerate(zip(demand.prompts.tolist(), demand.completions.tolist(), strict=True))
    ]
    if not demand.stream:
        prompts = [
            prompt
            for window in windows(prompts, model.slots)
            for prompt in longest_first(window, demand.max_tokens, model.max_length)
        ]
    # Counts of its own, so that a model can be asked several times.
    counted = Statistics()
    model = dataclasses.replace(model, statistics=counted, decode=Counter(), prefill=Counter())
    sampling = dataclasses.replace(sampling or SamplingParams(), max_tokens=demand.max_tokens)
    queue = PromptQueue(iter(prompts))
    queue.fill(1)
    finished, before_tail = 0, None
    while queue.head:
        for completions in scheduler(model, queue, sampling, calls).run():
            finished += len(completions)
            if before_tail is None and queue.is_exhausted and not queue.pending:
                before_tail = copy.copy(counted)
    if finished != len(prompts):
        raise RuntimeError(f"{finished} of {len(prompts)} prompts were decoded")
    tail = counted - (before_tail or counted)
    return StageSchedule(
        decode=model.decode,
        prefill=model.prefill,
        calls=counted.calls,
        busy_slot_steps=counted.sampled_tokens,
        tail_slot_steps=tail.slot_steps,
        tail_busy_slot_steps=tail.sampled_tokens,
        prompt_tokens=counted.prompt_tokens + demand.prefix,
        row_tokens=model.sizing.shards * sum(tokens * calls for tokens, calls in model.prefill.items()),
    )


@dataclass(frozen=True, eq=False)
class _Item:
    id: str
    tokens: np.ndarray
    prefix: tuple[int, ...] = ()


def replay_scoring(demand: Scoring, model: SupposedModel) -> StageSchedule:
    """Returns the calls that the engine makes for the log-probabilities of one call."""
    counted = Statistics()
    items = [_Item(f"{i:06d}", _prompt(i, tokens)) for i, tokens in enumerate(demand.prompts.tolist())]
    packed = PackedRows(model.sizing, counted)
    batches = itertools.chain(*map(packed.add, input_windows(items)), packed.rest())
    rows = Counter(batch.tokens.shape[1] for _, batch in batches)
    second: Counter[int] = Counter()
    if demand.branch:
        per_row = math.ceil(len(demand.prompts) / model.sizing.shards / rows.total())
        second[model.sizing.second_pass(per_row * demand.branch)] = rows.total()
    return StageSchedule(
        score=rows + second,
        prompt_tokens=counted.prompt_tokens,
        row_tokens=counted.padded_prompt_tokens,
    )


def schedule_of(demands: Sequence[Demand], model: SupposedModel) -> StageSchedule:
    """Returns the calls of programs that the loop makes for a stage."""
    total = StageSchedule()
    for demand in demands:
        if isinstance(demand, Training):
            total += StageSchedule(updates=demand.updates, validations=demand.validations)
        elif isinstance(demand, Scoring):
            total += replay_scoring(demand, model)
        else:
            total += replay_generation(demand, model)
    return total
