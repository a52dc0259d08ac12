"""Readings by the judge's log-probabilities of texts that are there already: no rubric, no new tokens.

What the instruction adds to the log-probability of the response is their pointwise mutual information. It is kin to the
instruction-following difficulty of Li et al. (2024, arXiv 2308.12032) and to the backward score of Humpback (Li et al.,
2023, arXiv 2308.06259), which reads the instruction given the response.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from isheep_jax.decode.requests import Request, TextLogprob
from isheep_jax.loop.judging.copying import copied_tokens
from isheep_jax.loop.judging.framing import ask
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.records import ReadingValue, user_text

# A prompt and the text after it whose log-probability is asked for.
_Question = tuple[Request, str]


def read_likelihood(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields the log-probability of each response after its prompt."""

    def question(candidate: Candidate) -> list[_Question]:
        return [(Request(reader.request_id("likelihood", candidate.id), candidate.prompt), candidate.response)]

    def value(candidate: Candidate, result: TextLogprob) -> ReadingValue:
        return _value(result.logprob, result.tokens)

    return _read(reader, candidates, question, value)


def read_ending(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields the log-probability that each response ends where it does: of the end of the turn after it."""

    def question(candidate: Candidate) -> list[_Question]:
        return [(Request(reader.request_id("ending", candidate.id), candidate.prompt), candidate.response)]

    def value(candidate: Candidate, result: TextLogprob) -> ReadingValue:
        if result.end is None:
            return ReadingValue(None, error="the judge has no token that ends a text")
        return _value(result.end, 0)

    return _read(reader, candidates, question, value)


def read_lift(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields how much likelier its prompt makes each response than a prompt without the instruction does.

    Only tokens that are not copied from the instruction and its input count: the instruction makes a copy likely
    whether it answers anything or not.
    """

    def questions(candidate: Candidate) -> list[_Question]:
        prompts = {"given": candidate.prompt, "empty": candidate.empty}
        return [
            (Request(reader.request_id("lift", name, candidate.id), prompt), candidate.response)
            for name, prompt in prompts.items()
        ]

    def value(candidate: Candidate, given: TextLogprob, empty: TextLogprob) -> ReadingValue:
        if len(given.logprobs) != len(empty.logprobs):
            # The first letters merged with the end of one prompt only, so that no token has a counterpart.
            return ReadingValue(None, error="the response has other tokens after an empty prompt")
        copied = copied_tokens((candidate.instruction, candidate.input), candidate.response, given.spans)
        pairs = zip(given.logprobs, empty.logprobs, copied)
        gains = [a - b for a, b, left_out in pairs if not left_out]
        return _value(math.fsum(gains), len(gains))

    return _read(reader, candidates, questions, value)


def read_backward_lift(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields how much likelier each response makes its instruction than no response does."""

    def questions(candidate: Candidate) -> list[_Question]:
        text = " " + user_text(candidate.instruction, candidate.input)
        responses = {"given": candidate.response, "empty": ""}
        return [
            (ask(reader, reader.request_id("backward_lift", name, candidate.id), "backward", response=response), text)
            for name, response in responses.items()
        ]

    def value(candidate: Candidate, given: TextLogprob, empty: TextLogprob) -> ReadingValue:
        return _value(given.logprob - empty.logprob, given.tokens)

    return _read(reader, candidates, questions, value)


def _value(logprob: float, tokens: int) -> ReadingValue:
    if math.isnan(logprob):
        return ReadingValue(None, error="the model's log-probabilities are not numbers")
    # Four places, as for scores: above the noise of another device count.
    return ReadingValue(round(logprob, 4), tokens)


def _read(
    reader: Reader,
    candidates: Sequence[Candidate],
    questions: Callable[[Candidate], list[_Question]],
    value: Callable[..., ReadingValue],
) -> Iterator[tuple[int, ReadingValue]]:
    """Yields the value of each pair that the answers to its questions give."""
    requests, texts, places = [], [], {}
    for i, candidate in enumerate(candidates):
        for k, (request, text) in enumerate(questions(candidate)):
            requests.append(request)
            texts.append(text)
            places[request.id] = i, k
    asked = len(requests) // max(len(candidates), 1)
    answers: dict[int, dict[int, TextLogprob]] = {}
    for result in reader.judge.text_logprobs(requests, texts):
        i, k = places[result.id]
        answers.setdefault(i, {})[k] = result
        if len(answers[i]) == asked:
            results = [result for _, result in sorted(answers.pop(i).items())]
            error = next((result.error for result in results if result.error), "")
            yield i, ReadingValue(None, error=error) if error else value(candidates[i], *results)
