"""The model's own scores of each pair: quality, and following the instruction, each from 1 to 10 (I-SHEEP section 3.2).

Two ways to read a score. 'sampled' is the paper's: sample a judgment, take the number it begins with. 'expected' takes
the mean under the model's own distribution over the ten numbers, by prefill alone: no judgment without a number, no
sampling noise, and fewer ties (Wang, Zhang & Choi 2025, arXiv 2503.03064: the mean beats single judgments throughout).
`assess.level` and `assess.prompt` say which scores are asked for: no other is computed.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Request, SamplingParams
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Pair, Score, Scores, dropped, kept

CRITERIA = ("quality", "following")

# More unscored pairs than this share, and the scores mean little.
UNSCORED_SHARE = 0.05

_LEADING_NUMBER = re.compile(
    # What may stand before it: white space, marks of bold text, opening quotes and brackets, a colon after the prompt.
    r"[\s*_`\"'“‘«(\[:：]*(\d+)(\.\d+)?"
    # No part of another number, a time, a date or a word (ASCII, because "8分" is a score), and no percentage.
    r"(?![\d.,:]*\d)(?!\s*%)(?![A-Za-z])"
    # Not the first of several to choose from.
    r"(?!\s*(-|–|—|~|to|or)\s*\d)"
    # Out of ten, where it says out of what.
    r"(?!\s*(/|／|out\s+of|of)\s*(?!10(?!\d))\d)"
)
_AUTHORS_NUMBER = re.compile(r"\W*(\d+)(\.\d+)?")

# Prompts that ask for one score of everything.
SINGLE = ("joint", "few_shot")


def asked(settings: AssessConfig) -> dict[str, str]:
    """The scores to ask for, by the field of `Scores`, with the name of each one's template."""
    if settings.level == "none":
        return {}
    if settings.prompt in SINGLE:
        return {"quality": settings.prompt}
    suffix = "" if settings.prompt == "standard" else f"_{settings.prompt}"
    return {criterion: criterion + suffix for criterion in CRITERIA if settings.level in (criterion, "both")}


def parse_score(text: str, parser: str = "strict") -> int | None:
    """The number that a judgment begins with, rounded to a whole one; None when there is none from 1 to 10.

    parser: of `assess.parser`. With either "8||good" is 8 and "10/10" is 10, and "Score: 9", "0" and "2024 is" are
    none. 'strict' rounds halves up ("8.5" is 9) and finds none in "-3" and "1-10 scale: 9". 'paper' rounds halves to
    the even number ("8.5" is 8), skips whatever is no letter or digit ("-3" is 3) and takes the first number of a range
    ("1-10 scale: 9" is 1).
    """
    match = (_LEADING_NUMBER if parser == "strict" else _AUTHORS_NUMBER).match(text)
    if not match:
        return None
    number = float(match.group(1) + (match.group(2) or ""))
    if parser == "paper":
        score = round(number)
        return score if 1 <= score <= 10 else None
    # "0.8" is on a scale to one, and "10.4" on none.
    return math.floor(number + 0.5) if 1 <= number <= 10 else None


def expected_score(result: ChoiceLogprobs) -> Score:
    """The mean of the score under the model's distribution over 1..10, from the ten log-probabilities."""
    if result.error or not result.logprobs:
        return Score(None, text=result.error)
    top = max(result.logprobs)
    if not math.isfinite(top):
        return Score(None, text="the model gives no probability to any score")
    weights = [math.exp(x - top) for x in result.logprobs]
    distribution = [w / sum(weights) for w in weights]
    value = sum(n * p for n, p in enumerate(distribution, start=1))
    # Four places are far below a score's meaning and above the noise of another device count.
    return Score(
        value=round(value, 4),
        argmax=distribution.index(max(distribution)) + 1,
        mass=round(math.exp(top) * sum(weights), 4),
        distribution=tuple(round(p, 4) for p in distribution),
    )


def sampled_score(results: Sequence[Completion], parser: str = "strict") -> Score:
    """The mean of the numbers of sampled judgments, and the number that most of them gave (of several the lowest)."""
    numbers = Counter(n for r in results if (n := parse_score(r.text, parser)) is not None)
    text = "\n".join(r.error or r.text.strip() for r in results)
    if not numbers:
        return Score(None, text=text)
    mean = sum(n * count for n, count in numbers.items()) / numbers.total()
    return Score(round(mean, 4), argmax=min(numbers, key=lambda n: (-numbers[n], n)), text=text)


def probability_above(score: Score, threshold: float) -> float | None:
    """P(score > threshold) under the model's distribution; None for a sampled or missing score."""
    if not score.distribution:
        return None
    return sum(p for n, p in enumerate(score.distribution, start=1) if n > threshold)


def assess(context: StageContext, judge: Model, pairs: Sequence[Pair], *, stage: str = "scores") -> list[Scores]:
    """Returns the scores of each of the (kept) pairs; a pair that lacks a score that was asked for is "unscored".

    stage: "scores", or "agreement" for those of a second judge.
    """
    settings = context.config.assess
    criteria = asked(settings)
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
        context.guard("min_score_mass", median_mass(scores), fresh=open_stage.fresh)
    return scores


def _requests(
    context: StageContext, pairs: Sequence[Pair], criteria: Mapping[str, str], samples: int
) -> tuple[list[Request], dict[str, tuple[int, str, int]]]:
    """Returns the requests for the scores of the pairs, and what each asks for: (index of pair, criterion, sample)."""
    templates, requests, keys = context.templates, [], {}
    for i, pair in enumerate(pairs):
        for criterion, template in criteria.items():
            prompt = templates.score(template, pair.instruction, pair.input, pair.response)
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


def median_mass(records: Sequence[Scores]) -> float | None:
    """Median probability that the judge gave to the ten scores together; None where none is known."""
    scores = (score for record in records for score in (record.quality, record.following))
    masses = sorted(score.mass for score in scores if score is not None and score.mass is not None)
    return masses[len(masses) // 2] if masses else None
