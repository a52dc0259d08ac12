"""Instructions from topics: the model lists topics for types of questions, then writes one question about each topic.

SELF-ALIGN's topic-guided path (arXiv 2305.03047 section 3.1). The types, with one topic and one question each, are
hand-written and next to the prompts.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.config import Config
from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters.verdicts import UNFINISHED, not_decoded
from isheep_jax.loop.prompting.protocols import ParsedInstruction
from isheep_jax.loop.prompting.ways import Way
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Topic, Verdict, dropped, kept
from isheep_jax.text_files import read_objects, texts

# How a line of the file of types looks.
_LIKE = '{"type": "...", "topic": "...", "question": "..."}'
# Rounds in which the topics of a type are collected, at most; each is one part of the stage.
ROUNDS = 9
# Topics shown in a prompt, and topics read from a completion at most.
SHOWN = 5
READ = 20
# New topics that a prompt of the first round is expected to give.
NEW_PER_PROMPT = 10
MAX_TOKENS = 128
MAX_WORDS = 3
# Topics collected per instruction: not every hint gets a good answer.
SPARE = 2
# Examples and open hints in a prompt for instructions.
HINTS = 5

_BULLET = re.compile(r"\s*(?:[-*•]|\d+\s*[.):])\s*")
_ASKS = re.compile(
    r"(what|who|whom|whose|which|when|where|why|how|is|are|was|do|does|did|can|could|should|would|will|please)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"[\w'’&+/.-]+(?: [\w'’&+/.-]+)*")
_HINTED = re.compile(r"\s*(?:\d+\s*[.):]\s*)?\(([^;()\n]+);([^()\n]+)\)\s*:?\s*(.*)")


@dataclass(frozen=True)
class Type:
    """A type of question, with a hand-written topic and a question of this type about it."""

    name: str
    topic: str
    question: str


@dataclass(frozen=True)
class Hint:
    """The type and topic that an instruction is asked for by."""

    type: str
    topic: str

    def __str__(self) -> str:
        return f"({self.type}; {self.topic})"


def read_types(path: Path) -> list[Type]:
    """Reads the types from a JSON Lines file with the fields type, topic and question.

    Raises UserError that names the line for a malformed or repeated type.
    """
    types: list[Type] = []
    for where, row in read_objects(path, "prompts", _LIKE):
        name, topic, question = texts(f"prompts: {where}", row, ("type", "topic", "question"))
        if any(c in name + topic for c in "();"):
            raise UserError(f"prompts: {where}: type and topic may have no brackets and semicolons")
        if name.casefold() in {t.name.casefold() for t in types}:
            raise UserError(f"prompts: {where}: the type {name!r} is there already")
        types.append(Type(name, topic, question))
    return types


def instructions_from_topics(config: Config) -> int:
    """Returns the number of instructions per iteration that are asked for by topic."""
    settings = config.synthesize
    return math.ceil(settings.instructions * settings.topic_share) if settings.method == "topics" else 0


def topics_per_type(config: Config, types: Sequence[Type]) -> int:
    """Returns the number of topics to collect for each type."""
    return math.ceil(SPARE * instructions_from_topics(config) / len(types))


def topic_reason(topic: str) -> str | None:
    """Returns why a line is no topic of a question, or None: a topic is a short name."""
    if not _NAME.fullmatch(topic) or topic[0].islower() or _ASKS.match(topic):
        return "not a noun phrase"
    if len(topic.split()) > MAX_WORDS:
        return "too long"
    return None


def read_topics(text: str, finished: bool) -> list[str]:
    """Returns the lines of a completion without bullets and closing marks; the last one only if it is `finished`."""
    lines = text.split("\n")
    lines = lines if finished else lines[:-1]
    topics = (_BULLET.sub("", line, count=1) if _BULLET.match(line) else line for line in lines)
    return [t for t in (topic.strip().rstrip(".,;:") for topic in topics) if t][:READ]


def brainstorm(context: StageContext, writer: Model, types: Sequence[Type]) -> list[Topic]:
    """Returns topics for each type, dropped ones included, until each has its share or the rounds are over.

    A round is one part of the stage. Its prompts show topics of the rounds before, so that lists do not begin alike.
    """
    total = topics_per_type(context.config, types) * len(types)
    with context.open("topics", total) as stage:
        if stage.fresh:
            state = _Brainstorm(context, types)
            for part in stage.parts:
                state.take(part)
                stage.advance(len(kept(part)))
            while requests := state.requests():
                completions = {c.id: c for c in writer.generate([r for _, _, r in requests], state.sampling)}
                part = state.records([(type, n, completions[request.id]) for type, n, request in requests])
                stage.write_part(part)
                state.take(part)
                stage.advance(len(kept(part)), dropped=len(state.all) - len(kept(state.all)))
            stage.summary["fewest of a type"] = min(len(pool) - 1 for pool in state.pools.values())
    return stage.records


class _Brainstorm:
    """The topics so far. The next round of prompts depends on nothing else."""

    def __init__(self, context: StageContext, types: Sequence[Type]):
        config = context.config
        self.sampling = SamplingParams(
            config.synthesize.temperature, config.synthesize.top_p, MAX_TOKENS, stop=("\n\n", "\nType of question:")
        )
        self.per_type = topics_per_type(config, types)
        self.pools = {t.name: [t.topic] for t in types}
        self.round = 0
        self.all: list[Topic] = []
        self._context, self._types = context, types

    def take(self, part: Sequence[Topic]) -> None:
        for record in kept(part):
            self.pools[record.type].append(record.topic)
        self.all.extend(part)
        self.round += 1

    def requests(self) -> list[tuple[Type, int, Request]]:
        """Returns type, number and request of each prompt of the next round; none at the end."""
        if self.round == ROUNDS:
            return []
        requests = []
        for index, type in enumerate(self._types):
            missing = self.per_type - (len(self.pools[type.name]) - 1)
            # Missing topics are spread over the remaining rounds, whose prompts show more topics.
            for n in range(math.ceil(missing / NEW_PER_PROMPT / (ROUNDS - self.round))):
                key = "topics", self.round, index, n
                pool = self.pools[type.name]
                shown = self._context.random(*key).sample(pool, min(SHOWN, len(pool)))
                prompt = self._context.templates.render("topics", type=type.name, question=type.question, topics=shown)
                request = Request(self._context.request_id(*key), prompt, self._context.templates.prefix("topics"))
                requests.append((type, n, request))
        return requests

    def records(self, answers: Sequence[tuple[Type, int, Completion]]) -> list[Topic]:
        """Returns the topics of a round with their verdicts."""
        known = {name: {t.casefold() for t in pool} for name, pool in self.pools.items()}
        part: list[Topic] = []

        def add(type: Type, prompt: int, topic: str, verdict: Verdict) -> None:
            id = f"{self._context.iteration}-topic-{len(self.all) + len(part):06d}"
            part.append(Topic(id, type.name, topic, self.round, prompt, verdict))

        for type, n, completion in answers:
            if verdict := not_decoded(completion):
                add(type, n, "", verdict)
                continue
            for topic in read_topics(completion.text, finished=completion.finish_reason == "stop"):
                reason = topic_reason(topic)
                if not reason and topic.casefold() in known[type.name]:
                    reason = "there already"
                if not reason:
                    known[type.name].add(topic.casefold())
                add(type, n, topic, dropped(reason) if reason else KEPT)
        return part


def hints(types: Sequence[Type], topics: Sequence[Topic]) -> list[Hint]:
    """Returns each kept topic of each type once, taking turns by type, so that any first part of them is balanced."""
    pools = {t.name: [r.topic for r in kept(topics) if r.type == t.name] for t in types}
    longest = max(map(len, pools.values()))
    return [Hint(name, pool[i]) for i in range(longest) for name, pool in pools.items() if i < len(pool)]


class Topics:
    """Prompts for instructions about topics: each shows examples by type and some open hints, and asks about these."""

    stop = ("\n\n", "\nHints:")

    def __init__(self, context: StageContext, types: Sequence[Type], hints: Sequence[Hint]):
        self._context, self._types = context, list(types)
        self._groups = [hints[i : i + HINTS] for i in range(0, len(hints), HINTS)]
        self.target, self.limit = instructions_from_topics(context.config), len(self._groups)

    def requests(self, numbers: Sequence[int], ways: Sequence[Way]) -> list[Request]:
        return [self._request(number) for number in numbers]

    def shown(self, number: int) -> tuple[str, ...]:
        """Returns the names of the types that are shown as examples."""
        return tuple(t.name for t in self._examples(number))

    def parse(self, number: int, completion: Completion) -> list[ParsedInstruction]:
        """Returns the lines of a completion as instructions.

        A line counts if it begins with one of the hints of its prompt; the first of several lines for a hint does.
        """
        open_hints = {str(h).casefold(): h for h in self._groups[number]}
        known = set(open_hints)
        finished = completion.finish_reason == "stop"
        lines = completion.text.split("\n")
        instructions = []
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            match = _HINTED.fullmatch(line)
            key = f"({match[1].strip()}; {match[2].strip()})".casefold() if match else ""
            if index == len(lines) - 1 and not finished:
                instructions.append(ParsedInstruction(line.strip(), "", UNFINISHED))
            elif key not in known:
                instructions.append(ParsedInstruction(line.strip(), "", "answers no hint"))
            elif key not in open_hints:
                instructions.append(ParsedInstruction(match[3].strip(), "", "hint is answered already"))
            else:
                instructions.append(ParsedInstruction(match[3].strip(), "", hint=str(open_hints.pop(key))))
        return instructions

    def _request(self, number: int) -> Request:
        templates = self._context.templates
        examples = [{"type": t.name, "topic": t.topic, "instruction": t.question} for t in self._examples(number)]
        hints = [{"type": h.type, "topic": h.topic} for h in self._groups[number]]
        prompt = templates.render("guided", examples=examples, hints=hints)
        return Request(self._context.request_id("synthesize", number), prompt, templates.prefix("guided"))

    def _examples(self, number: int) -> list[Type]:
        return self._context.random("guided", number).sample(self._types, min(HINTS, len(self._types)))
