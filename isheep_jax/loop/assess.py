"""The model's own scores of each pair: quality, and following the instruction, each from 1 to 10 (I-SHEEP section 3.2).

Two ways to read a score. 'sampled' is the paper's: sample a judgement, take the number it begins with. 'expected' takes
the mean under the model's own distribution over the ten numbers, by prefill alone: no judgement without a number, no
sampling noise, and fewer ties (Wang, Zhang & Choi 2025, arXiv 2503.03064: the mean beats single judgements throughout).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence

from isheep_jax.config import Config
from isheep_jax.decode.requests import ChoiceScores, Completion, Request, Sampling
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.loop.records import KEPT, Pair, Score, Scores, dropped
from isheep_jax.loop.run_directory import Stage
from isheep_jax.loop.synthesize import counts
from isheep_jax.loop.templates import Templates

CRITERIA = ("quality", "following")

_LEADING_NUMBER = re.compile(r"[\s*_\"'(\[]*(\d+)(\.\d+)?(?![\d.]*\d)(?!\s*(-|–|to)\s*\d)")


def parse_score(text: str) -> int | None:
    """The number that a judgement begins with, decimals rounded half up; None when there is none from 1 to 10.

    "8||good" is 8, "8.5" is 9, "10/10" is 10; "Score: 9", "-3", "1-10 scale: 9", "0" and "2024 is" are none.
    """
    match = _LEADING_NUMBER.match(text)
    if not match:
        return None
    score = math.floor(float(match.group(1) + (match.group(2) or "")) + 0.5)
    return score if 1 <= score <= 10 else None


def expected_score(result: ChoiceScores) -> Score:
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


def sampled_score(result: Completion) -> Score:
    """The number of a sampled judgement."""
    value = parse_score(result.text)
    return Score(None if value is None else float(value), argmax=value, text=result.error or result.text.strip())


def probability_above(score: Score, threshold: float) -> float | None:
    """P(score > threshold) under the model's distribution; None for a sampled or missing score."""
    if not score.distribution:
        return None
    return sum(p for n, p in enumerate(score.distribution, start=1) if n > threshold)


def assess(
    model: Model,
    config: Config,
    templates: Templates,
    pairs: Sequence[Pair],
    stage: Stage[Scores],
    iteration: int,
    progress: StageReporter,
) -> list[Scores]:
    """Both scores of each of the (kept) pairs; a pair without one of them is dropped as "unscored"."""
    settings = config.assess

    def ask(requests: Sequence[Request]) -> Iterator[tuple[str, Score]]:
        if settings.read == "expected":
            for result in model.score(requests, templates.choices):
                yield result.id, expected_score(result)
        else:
            sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens)
            for result in model.generate(requests, sampling):
                yield result.id, sampled_score(result)

    stage_records = stage.work(pairs, _process(ask, templates, iteration), progress.advance)
    masses = sorted(m for r in stage_records for m in (r.quality.mass, r.following.mass) if m is not None)
    summary = {"median_mass": masses[len(masses) // 2]} if masses else {}
    stage.finish({**counts(stage_records), **summary})
    return stage_records


def _process(
    ask: Callable[[Sequence[Request]], Iterator[tuple[str, Score]]], templates: Templates, iteration: int
) -> Callable[[Sequence[Pair]], Iterator[tuple[int, Scores]]]:
    def process(block: Sequence[Pair]) -> Iterator[tuple[int, Scores]]:
        requests, place = [], {}
        for i, pair in enumerate(block):
            for criterion in CRITERIA:
                prompt = templates.score(criterion, pair.instruction, pair.input, pair.response)
                requests.append(Request(f"{iteration}/assess/{criterion}/{pair.id}", prompt))
                place[requests[-1].id] = i, criterion
        found: dict[int, dict[str, Score]] = {}
        for id, score in ask(requests):
            i, criterion = place[id]
            scores = found.setdefault(i, {})
            scores[criterion] = score
            if len(scores) == len(CRITERIA):
                missing = [c for c in CRITERIA if scores[c].value is None]
                verdict = dropped("unscored", ", ".join(missing)) if missing else KEPT
                yield i, Scores(block[i].id, scores["quality"], scores["following"], verdict)

    return process
