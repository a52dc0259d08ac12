"""What readings of a judge work with: pairs to be read, who reads them, and what a reading is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from isheep_jax.config import AssessConfig
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.records import ReadingValue, Score
from isheep_jax.text.conversation import Conversation, Prompt

if TYPE_CHECKING:
    # Only here, because it loads what training needs, and commands check settings before they load anything.
    from isheep_jax.loop.protocols import Model

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
    judge: "Model"
    framing: Framing
    purpose: str

    def request_id(self, *parts: object) -> str:
        """Returns an id such as "1/assess/lift/1-000042-0"."""
        return "/".join(map(str, (self.purpose, *parts)))


# What a reading says of a pair: one number or, for the rubric, a score of each criterion.
Opinion = ReadingValue | Mapping[str, Score]


@dataclass(frozen=True)
class Reading:
    """One way to read an opinion."""

    describe: str
    """What a higher value means, as the object of "reads"."""
    read: Callable[[Reader, Sequence[Candidate]], Iterator[tuple[int, Opinion]]]
    """Yields the opinion on each pair with the pair's index, in any order."""
    blind_to: frozenset[str] = frozenset()
    """What it does not see: reasons of `filters.blind_spots`, whose rules drop such pairs where it is in use."""
    weight: float = 1.0
    """How much it counts among others, where `select.weights` does not say."""
    needs_weights: bool = True
    """Whether the judge must be a model here, not a server."""
    needs_others: bool = False
    """Whether it compares the responses to the same instruction, so that there must be at least two."""
    templates: tuple[str, ...] = ()
    """The prompt templates that it needs."""
