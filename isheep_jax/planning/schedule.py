"""What a stage asks of decoding and training, and the calls of programs that the loop makes for it."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Generation:
    """Requests of one call of the engine that samples completions.

    prompts: [n] int, tokens of each prompt after the shared prefix.
    completions: [n] int, tokens that each samples, the end token included.
    max_tokens: the most that a request may sample.
    prefix: tokens that all prompts begin with, computed once.
    stream: they are taken in their order as slots become idle (synthesize); a list is decoded longest first.
    """

    prompts: np.ndarray
    completions: np.ndarray
    max_tokens: int
    prefix: int = 0
    stream: bool = False


@dataclass(frozen=True)
class Scoring:
    """Requests of one call of the engine that reads log-probabilities.

    prompts: [n] int, tokens of each prompt after the shared prefix.
    prefix: tokens that all prompts begin with, computed once.
    branch: tokens of each prompt's choices in a second pass over them alone; 0: there is none.
    """

    prompts: np.ndarray
    prefix: int = 0
    branch: int = 0


@dataclass(frozen=True)
class Training:
    """A fine-tuning.

    updates: train steps.
    validations: batches of which the loss alone is computed.
    """

    updates: int
    validations: int = 0


Demand = Generation | Scoring | Training


@dataclass(frozen=True)
class StageSchedule:
    """The calls of programs that a stage makes, on all data shards together.

    decode: decode steps by (slots, cache positions that are read of each slot).
    prefill, score: device calls by the tokens of each of their rows.
    updates, validations: as in `Training`.
    calls: device calls of the decode program.
    busy_slot_steps: steps summed over the slots that were busy in them.
    tail_slot_steps, tail_busy_slot_steps: slots, and busy ones, summed over the steps after the last prompt had got
        its slot.
    prompt_tokens: tokens that prefill and scoring needed; their rows have padding besides.
    row_tokens: tokens of their rows, on all data shards.
    host_seconds: time in which the devices wait for the host.
    """

    decode: Counter[tuple[int, int]] = field(default_factory=Counter)
    prefill: Counter[int] = field(default_factory=Counter)
    score: Counter[int] = field(default_factory=Counter)
    updates: int = 0
    validations: int = 0
    calls: int = 0
    busy_slot_steps: int = 0
    tail_slot_steps: int = 0
    tail_busy_slot_steps: int = 0
    prompt_tokens: int = 0
    row_tokens: int = 0
    host_seconds: float = 0.0

    def __add__(self, other: "StageSchedule") -> "StageSchedule":
        return StageSchedule(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def steps(self) -> int:
        """Decode steps of any number of slots."""
        return sum(self.decode.values())

    @property
    def slots_busy(self) -> float:
        """The share of the slots, over all steps, in which a token was sampled that a request needed."""
        slot_steps = sum(slots * steps for (slots, _), steps in self.decode.items())
        return self.busy_slot_steps / slot_steps if slot_steps else 1.0

    @property
    def slots_busy_before_tail(self) -> float:
        """The same over the steps in which prompts waited; 1 where none did."""
        slot_steps = sum(slots * steps for (slots, _), steps in self.decode.items()) - self.tail_slot_steps
        return (self.busy_slot_steps - self.tail_busy_slot_steps) / slot_steps if slot_steps else 1.0

    @property
    def padding(self) -> float:
        """Tokens of rows per token that was needed, in prefill and scoring."""
        return self.row_tokens / self.prompt_tokens if self.prompt_tokens else 1.0
