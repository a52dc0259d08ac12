"""Readings that compare the responses to the same instruction with each other."""

import math
from collections.abc import Iterator, Sequence

from rapidfuzz.distance import LCSseq

from isheep_jax.decode.requests import ChoiceLogprobs, Request
from isheep_jax.loop.filters.normalization import tokenize
from isheep_jax.loop.filters.novelty import rouge_l
from isheep_jax.loop.judging.framing import ask
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.records import ReadingValue

# What follows a prompt that shows two responses: the one that is better.
CHOICES = (" A", " B")

_ALONE = ReadingValue(None, error="there is no other response to compare with")


def read_self_consistency(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields the mean ROUGE-L F1 (0 to 1) of each response with the others; no model is asked."""
    for i, candidate in enumerate(candidates):
        own, *others = (tokenize(text) for text in (candidate.response, *candidate.others))
        shared = [rouge_l(LCSseq.similarity(own, other), len(own), len(other)) for other in others]
        yield i, _mean(shared) if shared else _ALONE


def read_pairwise(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, ReadingValue]]:
    """Yields the mean probability (0 to 1) that the judge prefers each response to another one, over both orders.

    A judge may prefer what it sees first, whatever it is; with both orders that takes from none.
    """
    requests: dict[object, Request] = {}
    # What each candidate needs: the id of a request, and which of the two responses is its own.
    needed: list[list[tuple[str, int]]] = []
    for candidate in candidates:
        needed.append([])
        for other in candidate.others:
            for own, pair in enumerate(((candidate.response, other), (other, candidate.response))):
                id = reader.request_id("pairwise", candidate.id, len(needed[-1]))
                request = _request(reader, id, candidate, *pair)
                # The other response asks the same.
                needed[-1].append((requests.setdefault(request.prompt, request).id, own))
    results = {result.id: result for result in reader.judge.choice_logprobs(list(requests.values()), CHOICES)}
    for i, asked in enumerate(needed):
        yield i, _preference([(results[id], own) for id, own in asked])


def _request(reader: Reader, id: str, candidate: Candidate, first: str, second: str) -> Request:
    return ask(
        reader,
        id,
        "pairwise",
        instruction=candidate.instruction,
        input=candidate.input,
        first=first,
        second=second,
    )


def _preference(answers: Sequence[tuple[ChoiceLogprobs, int]]) -> ReadingValue:
    if not answers:
        return _ALONE
    error = next((result.error for result, _ in answers if result.error), "")
    if error:
        return ReadingValue(None, error=error)
    odds = [result.logprobs[own] - result.logprobs[1 - own] for result, own in answers]
    if any(map(math.isnan, odds)):
        return ReadingValue(None, error="the model's log-probabilities are not numbers")
    # The least keeps exp from overflowing.
    return _mean([1 / (1 + math.exp(-max(each, -700.0))) for each in odds])


def _mean(values: Sequence[float]) -> ReadingValue:
    return ReadingValue(round(math.fsum(values) / len(values), 4))
