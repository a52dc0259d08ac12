"""What the stages `synthesize` and `respond` need from a method of prompting, and what they read out of completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from isheep_jax.decode.requests import Completion, Request
from isheep_jax.loop.prompting.ways import Way
from isheep_jax.loop.records import Instruction


@dataclass(frozen=True)
class ParsedInstruction:
    """An instruction as parsed from a completion.

    reason: why it is none, such as "not in the form" or "unfinished"; "" if it is one. hint: the "(type; topic)" that
    it answers, if it was asked for by topic.
    """

    instruction: str
    input: str
    reason: str = ""
    hint: str | None = None


class PromptSource(Protocol):
    """A source of prompts for new instructions.

    stop: strings that end a completion. target: number of kept instructions at which the stage leaves this source for
    the next one. limit: number of prompts that it has; None if it always has another one.
    """

    stop: tuple[str, ...]
    target: int
    limit: int | None

    def requests(self, numbers: Sequence[int], ways: Sequence[Way]) -> list[Request]:
        """Returns the requests for prompts.

        numbers: index of each prompt in its iteration. ways: the way of each, of which a source uses what it can.
        """

    def parse(self, number: int, completion: Completion) -> list[ParsedInstruction]:
        """Returns the instructions in the completion of a prompt."""

    def shown(self, number: int) -> tuple[str, ...]:
        """Returns the ids of what a prompt showed that was requested."""


class ParsedResponse(NamedTuple):
    """A response as parsed from a completion.

    thoughts: what the model wrote before it; None if it was not asked to. reason: why it is dropped, or None.
    """

    thoughts: str | None
    text: str
    reason: str | None


class ResponsePrompts(Protocol):
    """Prompts for responses. stop: strings that end a completion."""

    stop: tuple[str, ...]

    def request(self, id: str, instruction: Instruction) -> Request:
        """Returns the request for a response to an instruction."""

    def parse(self, text: str, instruction: Instruction) -> ParsedResponse:
        """Returns the response in a completion."""
