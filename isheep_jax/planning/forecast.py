"""Forecasts what an iteration takes: steps of programs by the loop's schedule, and what stands between the stages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isheep_jax.planning.schedule import StageSchedule
from isheep_jax.planning.step_time import StepTime

# Share of a train step that the loss alone takes: its forward pass, of a forward pass, one that is done again and a
# backward pass as long.
VALIDATION_SHARE = 1 / 3


@dataclass(frozen=True)
class StepTimes:
    """Times of one call of each program, at the sizes for which they are known.

    block: cache positions between the times of decode steps: those that attention reads at a time.
    decode: for numbers of slots, the times by blocks of cache positions that are read of each: one block first.
    prefill, score: for tokens of a row.
    train: of an update.
    """

    block: int
    decode: Mapping[int, Sequence[StepTime]]
    prefill: Mapping[int, StepTime]
    score: Mapping[int, StepTime]
    train: StepTime

    def decode_step(self, slots: int, positions: int) -> StepTime:
        """Returns the time of a decode step that reads so many cache positions of each slot."""
        blocks = positions / self.block
        return _between({size: _at_block(times, blocks) for size, times in self.decode.items()}, slots)

    def prefill_call(self, tokens: int) -> StepTime:
        """Returns the time of a call of prefill with rows of so many tokens."""
        return _between(self.prefill, tokens)

    def stage(self, schedule: StageSchedule) -> StepTime:
        """Returns the time of all calls of a stage."""
        total = StepTime(host=schedule.host_seconds)
        for (slots, positions), steps in schedule.decode.items():
            total += self.decode_step(slots, positions) * steps
        for times, calls in ((self.prefill, schedule.prefill), (self.score, schedule.score)):
            for tokens, count in calls.items():
                total += _between(times, tokens) * count
        return total + self.train * (schedule.updates + VALIDATION_SHARE * schedule.validations)


def _at_block(times: Sequence[StepTime], blocks: float) -> StepTime:
    """Returns the time for a number of blocks, on the line through the nearest two that are known."""
    if len(times) == 1:
        return times[0]
    first = min(max(math.floor(blocks), 1), len(times) - 1)
    return times[first - 1] + (times[first] + times[first - 1] * -1.0) * (blocks - first)


def _between(times: Mapping[int, StepTime], size: int) -> StepTime:
    """Returns the time at a size on the line through the two nearest that are known, but not below zero in any part."""
    if size in times:
        return times[size]
    sizes = sorted(times)
    if len(sizes) == 1:
        # Below the only size that is known nothing is gained; above it, everything grows with the size.
        return times[sizes[0]] * max(1.0, size / sizes[0])
    upper = next((i for i in range(1, len(sizes)) if sizes[i] >= size), len(sizes) - 1)
    a, b = sizes[upper - 1], sizes[upper]
    share = (size - a) / (b - a)
    return StepTime(*(max(0.0, x) for x in times[a] * (1 - share) + times[b] * share))
