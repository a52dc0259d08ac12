"""The rubric: the judge reads criteria and a pair, and gives scores from 1 to 10 (I-SHEEP section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence

from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Request, SamplingParams
from isheep_jax.loop.judging.framing import ask
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.judging.scores import NUMBERS, criteria_of, expected_score, sampled_score
from isheep_jax.loop.records import Score

_Answers = Mapping[tuple[str, int], ChoiceLogprobs | Completion]


def read_rubric(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, dict[str, Score]]]:
    """Yields the scores of each pair by criterion, with the pair's index."""
    settings = reader.settings
    criteria = criteria_of(settings)
    samples = settings.samples if settings.read == "sampled" else 1
    requests, asked_for = [], {}
    for i, candidate in enumerate(candidates):
        for criterion, template in criteria.items():
            for sample in range(samples):
                id = reader.request_id(criterion, candidate.id, *([sample] if sample else []))
                requests.append(_request(reader, id, template, candidate))
                asked_for[id] = i, criterion, sample
    answers: dict[int, dict[tuple[str, int], ChoiceLogprobs | Completion]] = {}
    for result in _ask(reader, requests):
        i, criterion, sample = asked_for[result.id]
        answers.setdefault(i, {})[criterion, sample] = result
        if len(answers[i]) == len(criteria) * samples:
            own = answers.pop(i)
            yield i, {criterion: _score(settings, own, criterion, samples) for criterion in criteria}


def _request(reader: Reader, id: str, template: str, candidate: Candidate) -> Request:
    return ask(
        reader,
        id,
        template,
        instruction=_with_history(candidate),
        input=candidate.input,
        response=candidate.response,
    )


def _with_history(candidate: Candidate) -> str:
    """Returns the instruction after the earlier turns, for prompts that show one pair."""
    labels = {"user": "Instruction: ", "assistant": "Response: "}
    turns = [f"{labels[message.role]}{message.content}\n\n" for message in candidate.history]
    return f"{''.join(turns)}Instruction: {candidate.instruction}".removeprefix("Instruction: ")


def _ask(reader: Reader, requests: Sequence[Request]) -> Iterator[ChoiceLogprobs] | Iterator[Completion]:
    settings = reader.settings
    if settings.read == "expected":
        return reader.judge.choice_logprobs(requests, NUMBERS)
    return reader.judge.generate(requests, SamplingParams(settings.temperature, settings.top_p, settings.max_tokens))


def _score(settings: AssessConfig, answers: _Answers, criterion: str, samples: int) -> Score:
    if settings.read == "expected":
        return expected_score(answers[criterion, 0])
    return sampled_score([answers[criterion, k] for k in range(samples)], settings.parser)
