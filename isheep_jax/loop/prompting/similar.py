"""Prompts that show pairs by similarity (ISARA-style, arXiv 2401.06785).

A prompt for a new question shows a random pair of the pool and the pairs whose questions are most similar to it; a
prompt for an answer shows the pairs most similar to its question. The prompts hold no rules and no explanation.
Similarity is the cosine of the writing model's own mean last hidden states.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from isheep_jax.config import Config
from isheep_jax.decode.requests import Completion, Request
from isheep_jax.errors import UserError
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters import clusters
from isheep_jax.loop.filters.verdicts import UNFINISHED
from isheep_jax.loop.prompting.protocols import ParsedInstruction, ParsedResponse
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.templates import MARK, Templates
from isheep_jax.loop.prompting.ways import Way
from isheep_jax.loop.protocols import Backend, Model
from isheep_jax.loop.records import Instruction, Selected, ShownExamples, Vector, kept, user_text
from isheep_jax.loop.stages import measure


@dataclass(frozen=True)
class Sample:
    """A pair that a prompt may show. id: the seed's or the pair's."""

    id: str
    question: str
    answer: str


def is_used(config: Config) -> bool:
    """Returns whether any prompt shows pairs by similarity."""
    return "retrieved" in (config.synthesize.method, config.respond.method)


def stops_of(templates: Templates) -> tuple[str, str]:
    """Returns the labels after the examples' questions and answers in the template `retrieved`.

    Both are stop strings of every completion, since a model that loses the form may write either.
    """
    text = _render(templates, [{"question": MARK, "answer": MARK}] * 2)
    _, question, answer, *_ = (*text.split(MARK), "", "")
    return question.rstrip(), answer.rstrip()


def check_template(templates: Templates) -> None:
    """Raises UserError if the template has no text after a question or an answer, so that nothing would end it."""
    if not all(stops_of(templates)):
        path = templates.directory / "retrieved.jinja"
        raise UserError(f"prompts: {path} should show each example's question, a label, its answer and a label")


def samples_of(seeds: Sequence[Seed], pairs: Sequence[Selected]) -> list[Sample]:
    """Returns the pool of seeds and pairs."""
    questions = [Sample(s.id, user_text(s.instruction, s.input), s.output) for s in seeds]
    return questions + [Sample(p.id, user_text(p.instruction, p.input), p.response) for p in pairs]


def embed_pool(context: StageContext, writer: Model, backend: Backend) -> "Neighbors":
    """Returns the pairs that prompts of this iteration may show, embedded by its writer."""
    earlier = range(1, context.iteration) if context.config.retrieval.pool == "seeds_and_kept" else ()
    pairs = [p for n in earlier for p in kept(context.files("selected", n).records())]
    samples = samples_of(context.seeds, pairs)
    vectors = measure.embed(context, writer, {s.id: s.question for s in samples}, stage="pool")
    return Neighbors(context, backend, samples, vectors)


class Neighbors:
    """The pool of an iteration, searchable by similarity. Samples whose vector is missing are never shown."""

    def __init__(self, context: StageContext, backend: Backend, samples: Sequence[Sample], vectors: Sequence[Vector]):
        embedded = [(s, v.vector) for s, v in zip(samples, vectors, strict=True) if not v.error]
        if not embedded:
            raise UserError("synthesize.seeds: no seed fits the context; raise decode.max_length or shorten the seeds")
        self._samples = [sample for sample, _ in embedded]
        # float16, as in the records. Rows are filled one by one: all of them in float32 would take too much memory.
        self._vectors = np.empty((len(embedded), len(clusters.decode(embedded[0][1]))), np.float16)
        for row, (_, vector) in zip(self._vectors, embedded):
            row[:] = clusters.decode(vector)
        self._index = backend.index(self._vectors)
        self._context, self._settings = context, context.config.retrieval
        self.by_id = {s.id: s for s in self._samples}

    def of_prompts(self, prompts: Sequence[int]) -> list[tuple[str, ...]]:
        """Returns the ids that each prompt for a new question shows: a random sample last, its neighbors before it."""
        count = min(self._settings.examples, len(self._samples))
        generators = [self._context.random("synthesize", k) for k in prompts]
        if self._settings.choose == "random":
            return [tuple(s.id for s in rng.sample(self._samples, count)) for rng in generators]
        anchors = [rng.randrange(len(self._samples)) for rng in generators]
        nearest = self._index.nearest(self._vectors[anchors], count)
        others = [[i for i in row.tolist() if i != anchor][: count - 1] for row, anchor in zip(nearest, anchors)]
        return [self._ids([anchor, *near]) for anchor, near in zip(anchors, others)]

    def of_questions(self, model: Model, questions: Sequence[tuple[str, str]]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields the id of each question with the ids of the most similar pairs, the nearest last.

        questions: id and text of each.
        """
        count = min(self._settings.examples, len(self._samples))
        if self._settings.choose == "random":
            for id, _ in questions:
                rng = self._context.random("examples", id)
                yield id, tuple(s.id for s in rng.sample(self._samples, count))
            return
        requests = [Request(self._context.request_id("nearest", id), text) for id, text in questions]
        vectors = {v.id: v.vector for v in model.embed(requests) if not v.error}
        known = [i for i, request in enumerate(requests) if request.id in vectors]
        # Encoding and decoding rounds them like the vectors of the pool.
        rows = [clusters.decode(clusters.encode(vectors[requests[i].id])) for i in known]
        nearest = dict(zip(known, self._index.nearest(np.stack(rows), count).tolist())) if rows else {}
        for i, (id, _) in enumerate(questions):
            yield id, self._ids(nearest.get(i, []))

    def _ids(self, nearest_first: Sequence[int]) -> tuple[str, ...]:
        # The nearest comes last, next to the text to be written.
        return tuple(self._samples[i].id for i in reversed(nearest_first))


def choose_examples(
    context: StageContext, writer: Model, neighbors: Neighbors, instructions: Sequence[Instruction]
) -> list[ShownExamples]:
    """Returns which pairs the prompt for the answer to each instruction shows."""
    with context.open("examples", len(instructions)) as stage:
        for block in stage.blocks(instructions):
            questions = [(x.id, user_text(x.instruction, x.input)) for x in block]
            for i, (id, examples) in enumerate(neighbors.of_questions(writer, questions)):
                stage.put(i, ShownExamples(id, examples))
    return stage.records


class SimilarPairs:
    """Prompts for new questions, one per completion."""

    limit = None

    def __init__(self, context: StageContext, neighbors: Neighbors):
        self.stop = stops_of(context.templates)
        self.target = context.config.synthesize.instructions
        self._context, self._neighbors = context, neighbors
        self._shown: dict[int, tuple[str, ...]] = {}

    def requests(self, numbers: Sequence[int], ways: Sequence[Way]) -> list[Request]:
        self._shown |= dict(zip(numbers, self._neighbors.of_prompts(numbers) if numbers else ()))
        return [
            Request(self._context.request_id("synthesize", number), _render(self._context.templates, pairs))
            for number, pairs in ((n, _fields(self._neighbors, self._shown[n])) for n in numbers)
        ]

    def parse(self, number: int, completion: Completion) -> list[ParsedInstruction]:
        finished = completion.finish_reason == "stop"
        return [ParsedInstruction(completion.text.strip(), "", "" if finished else UNFINISHED)]

    def shown(self, number: int) -> tuple[str, ...]:
        return self._shown[number]


class SimilarPairsForResponses:
    """Prompts for answers. shown: ids of the pairs that the prompt of each instruction shows."""

    def __init__(self, templates: Templates, neighbors: Neighbors, shown: Sequence[ShownExamples]):
        self._templates, self._neighbors = templates, neighbors
        self._shown = {s.id: s.examples for s in shown}
        self.stop = stops_of(templates)

    def request(self, id: str, instruction: Instruction) -> Request:
        question = user_text(instruction.instruction, instruction.input)
        return Request(id, _render(self._templates, _fields(self._neighbors, self._shown[instruction.id]), question))

    def parse(self, text: str, instruction: Instruction) -> ParsedResponse:
        return ParsedResponse(None, text, None)


def _fields(neighbors: Neighbors, ids: Sequence[str]) -> list[dict[str, str]]:
    return [{"question": s.question, "answer": s.answer} for s in (neighbors.by_id[id] for id in ids)]


def _render(templates: Templates, examples: Sequence[dict[str, str]], question: str = "") -> str:
    """Renders the prompt for the answer to a question, or for another question if there is none."""
    return templates.render("retrieved", examples=examples, question=question)
