"""Ways of prompting for new instructions: each is tried equally, then the one with the best yield is used."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isheep_jax.config import SynthesizeConfig
from isheep_jax.loop.records import Instruction, kept

# The reason of an instruction that passed every rule when enough were there; it was not compared with the others.
MORE_THAN_NEEDED = "more than needed"


@dataclass(frozen=True)
class Way:
    """What may differ between prompts. shots: seed tasks in the prompt. temperature: of the sampling."""

    shots: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.shots} shots at temperature {self.temperature:g}"


@dataclass(frozen=True)
class Yield:
    """What prompts gave. tokens: new tokens of their completions. kept: instructions, also more than were needed."""

    prompts: int = 0
    tokens: int = 0
    kept: int = 0

    @classmethod
    def of(cls, records: Sequence[Instruction]) -> "Yield":
        """Returns what all prompts of some records gave."""
        firsts = [r.tokens for r in records if r.tokens is not None]
        spare = sum(r.verdict.reason == MORE_THAN_NEEDED for r in records)
        return cls(len(firsts), sum(firsts), len(kept(records)) + spare)

    @property
    def per_thousand_tokens(self) -> float | None:
        """Kept instructions per thousand new tokens; None where there are no tokens."""
        return round(1000 * self.kept / self.tokens, 3) if self.tokens else None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {**dataclasses.asdict(self), "per_thousand_tokens": self.per_thousand_tokens}

    def __add__(self, other: "Yield") -> "Yield":
        return Yield(self.prompts + other.prompts, self.tokens + other.tokens, self.kept + other.kept)


class Trial:
    """The yields of the ways so far, and the way of the next prompts."""

    def __init__(self, settings: SynthesizeConfig):
        ways = ways_of(settings)
        self.yields = dict.fromkeys(ways, Yield())
        self._ways = ways
        self._prompts = settings.trial_prompts * len(ways) if len(ways) > 1 else 0
        self._best: Way | None = None  # as the trial ended

    @property
    def prompts(self) -> int:
        """Number of prompts that the trial still takes."""
        return max(0, self._prompts - sum(y.prompts for y in self.yields.values()))

    @property
    def best(self) -> Way:
        """The way with the best yield in the trial; the first of equal ones."""
        return self._best or max(self._ways, key=lambda way: self.yields[way].per_thousand_tokens or 0.0)

    def choose(self, count: int) -> list[Way]:
        """Returns the ways of the next prompts: in turn during the trial, so that all see the same pool grow."""
        if self.prompts:
            return [self._ways[(i - self.prompts) % len(self._ways)] for i in range(count)]
        return [self.best] * count

    def add(self, way: Way, records: Sequence[Instruction]) -> None:
        """Counts the records of prompts of a way."""
        self.yields[way] += Yield.of(records)
        if not self.prompts and self._best is None:
            self._best = self.best


def ways_of(settings: SynthesizeConfig) -> list[Way]:
    """Returns the combinations of the settings' shots and temperatures, that of the main settings first."""
    shots = (settings.shots, *settings.other_shots)
    temperatures = (settings.temperature, *settings.other_temperatures)
    return [Way(*pair) for pair in itertools.product(shots, temperatures)]
