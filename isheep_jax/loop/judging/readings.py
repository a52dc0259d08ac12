"""How a judge's opinion of a pair is read, an entry of `READINGS` each: what it asks, what it cannot see.

A reading gives one number per pair, and higher is better. It knows no run directory: the stage `assess`, the check of a
judge and measurements on published pairs all call `read`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from isheep_jax.config import AssessConfig
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import ReadingValue, Scores
from isheep_jax.text.conversation import Conversation, Prompt

Framing = Literal["text", "chat"]


@dataclass(frozen=True)
class Candidate:
    """A pair to be read.

    prompt: what was answered. empty: the same without the instruction. history: earlier turns of the conversation.
    others: the other responses to the same instruction.
    """

    id: str
    instruction: str
    input: str
    response: str
    prompt: Prompt
    empty: Prompt
    history: Conversation = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Who reads, and how.

    settings: the readings and how they are made. templates: of the run. judge: the model. framing: of its prompts.
    purpose: beginning of the ids of its requests, such as "1/assess".
    """

    settings: AssessConfig
    templates: Templates
    judge: Model
    framing: Framing
    purpose: str


@dataclass(frozen=True)
class Reading:
    """One way to read an opinion."""

    describe: str
    """What a higher value means, as the object of "reads"."""
    read: Callable[[Reader, Sequence[Candidate]], Iterator[tuple[int, ReadingValue]]]
    """Yields the value of each pair with the pair's index, in any order."""
    blind_to: frozenset[str] = frozenset()
    """What it does not see: reasons of `filters.blind_spots`, whose rules drop such pairs where it is in use."""
    needs_weights: bool = True
    """Whether the judge must be a model here, not a server."""
    needs_others: bool = False
    """Whether it compares the responses to the same instruction, so that there must be at least two."""


READINGS: dict[str, Reading] = {}


def read(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, Scores]]:
    """Yields what the judge says of each pair with the pair's index, in any order.

    A pair for which a reading has no value is "unscored"; one in a reading's blind spot is dropped with the reason.
    """
    raise NotImplementedError
