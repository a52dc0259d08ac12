"""A judge that several readings share: what one of them has asked is not asked again."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Embedding, Request, SamplingParams, TextLogprob
from isheep_jax.loop.protocols import Model
from isheep_jax.text.conversation import Prompt

_Question = tuple[Prompt, str]


class AskedOnce:
    """A `Model` that keeps the log-probabilities of texts: those of a response serve every reading that looks at it."""

    def __init__(self, judge: Model):
        self._judge = judge
        self._answers: dict[_Question, TextLogprob] = {}

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> Iterator[TextLogprob]:
        """Yields what the judge says of each text, asking it for each pair of prompt and text once."""
        ids: dict[_Question, list[str]] = defaultdict(list)
        new: dict[str, tuple[Request, _Question]] = {}
        for request, text in zip(requests, texts, strict=True):
            question = request.prompt, text
            if question not in ids and question not in self._answers:
                new[request.id] = request, question
            ids[question].append(request.id)
        for question in (question for question in ids if question in self._answers):
            yield from (dataclasses.replace(self._answers[question], id=id) for id in ids[question])
        asked = [request for request, _ in new.values()], [text for _, (_, text) in new.values()]
        for result in self._judge.text_logprobs(*asked) if new else ():
            question = new[result.id][1]
            self._answers[question] = result
            yield from (dataclasses.replace(result, id=id) for id in ids[question])

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        return self._judge.generate(requests, sampling)

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        return self._judge.choice_logprobs(requests, choices)

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        return self._judge.embed(requests)
