"""Scores each pair for quality and for following the instruction, from 1 to 10 each (I-SHEEP section 3.2)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Request, SamplingParams
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.judging.scores import criteria_of, expected_score, median_mass, sampled_score
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Pair, Scores, dropped, kept

# Share of unscored pairs above which the user is warned: the scores then mean little.
UNSCORED_SHARE = 0.05


def assess(context: StageContext, judge: Model, pairs: Sequence[Pair], *, stage: str = "scores") -> list[Scores]:
    """Returns the scores of each of the (kept) pairs; a pair that lacks a score that was asked for is "unscored".

    stage: "scores", or "agreement" for those of a second judge.
    """
    settings = context.config.assess
    criteria = criteria_of(settings)
    samples = settings.samples if settings.read == "sampled" else 1
    with context.open(stage, len(pairs)) as open_stage:
        for block in open_stage.blocks(pairs if criteria else []):
            requests, keys = _requests(context, block, criteria, samples)
            results: dict[int, dict[tuple[str, int], ChoiceLogprobs | Completion]] = {}
            for result in _ask(context, judge, requests):
                i, criterion, sample = keys[result.id]
                results.setdefault(i, {})[criterion, sample] = result
                if len(results[i]) == len(criteria) * samples:
                    open_stage.put(i, _scores(settings, block[i].id, results.pop(i), criteria, samples))
        if (mass := median_mass(open_stage.records)) is not None:
            open_stage.summary["median_mass"] = mass
    scores = open_stage.records
    unscored = len(scores) - len(kept(scores))
    if stage == "scores":
        if open_stage.fresh and unscored > UNSCORED_SHARE * len(scores):
            text = f"iteration {context.iteration}: {unscored} of {len(scores)} pairs got no score"
            context.reporter.warn(text)
        hint = "the scoring prompts may not suit it"
        context.guard("min_score_mass", median_mass(scores), hint=hint, fresh=open_stage.fresh)
    return scores


def _requests(
    context: StageContext, pairs: Sequence[Pair], criteria: Mapping[str, str], samples: int
) -> tuple[list[Request], dict[str, tuple[int, str, int]]]:
    """Returns the requests for the scores of the pairs, and what each asks for: (index of pair, criterion, sample)."""
    templates, requests, keys = context.templates, [], {}
    for i, pair in enumerate(pairs):
        for criterion, template in criteria.items():
            prompt = templates.render(template, instruction=pair.instruction, input=pair.input, response=pair.response)
            for sample in range(samples):
                id = context.request_id("assess", criterion, pair.id, *([sample] if sample else []))
                requests.append(Request(id, prompt, templates.prefix(template)))
                keys[id] = i, criterion, sample
    return requests, keys


def _ask(
    context: StageContext, judge: Model, requests: Sequence[Request]
) -> Iterator[ChoiceLogprobs] | Iterator[Completion]:
    settings = context.config.assess
    if settings.read == "expected":
        return judge.choice_logprobs(requests, context.templates.choices)
    return judge.generate(requests, SamplingParams(settings.temperature, settings.top_p, settings.max_tokens))


def _scores(
    settings: AssessConfig,
    id: str,
    results: Mapping[tuple[str, int], ChoiceLogprobs | Completion],
    criteria: Iterable[str],
    samples: int,
) -> Scores:
    scores = {}
    for criterion in criteria:
        if settings.read == "expected":
            scores[criterion] = expected_score(results[criterion, 0])
        else:
            scores[criterion] = sampled_score([results[criterion, k] for k in range(samples)], settings.parser)
    missing = [criterion for criterion, score in scores.items() if score.value is None]
    verdict = dropped("unscored", ", ".join(missing)) if missing else KEPT
    return Scores(id, scores.get("quality"), scores.get("following"), verdict)
