"""Who scores: one of the run's models, another model or a server; and how far two judges agree."""

import math
import random
from collections.abc import Sequence

from etils import epath

from isheep_jax.config import Config
from isheep_jax.loop.records import Pair, Score, Scores, kept
from isheep_jax.loop.run_directory import RunDirectory


def identity(directory: epath.Path | None) -> dict[str, str]:
    """What names an external judge when a run resumes: the end of its path, which for a hub id is its revision."""
    return {} if directory is None else {"assess.judge": "/".join(directory.parts[-2:])}


def own_model(directory: RunDirectory, judge: str, number: int) -> epath.Path | None:
    """The model of the run that judges in iteration `number`; None for the base model."""
    back = {"current": 1, "previous": 2, "base": number}[judge]
    return directory.model(max(number - back, 0))


def second_judge(config: Config) -> str:
    """Whom the judge is compared with."""
    return "current" if config.assess.judge == "base" else "base"


def sample(config: Config, number: int, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that two judges score: `assess.agreement` of them, in the order of generation."""
    rng = random.Random(f"{config.seed}/{number}/agreement")
    return [pairs[i] for i in sorted(rng.sample(range(len(pairs)), min(config.assess.agreement, len(pairs))))]


def agreement(first: Sequence[Scores], second: Sequence[Scores], threshold: float) -> dict:
    """How far two judges agree on the pairs that both of them scored.

    pairs: how many. correlation: Spearman's, of the mean scores (None where one judge gives all the same).
    difference: mean of the second's mean score minus the first's. same_verdict: share of the pairs (0 to 1) on which
    both say alike whether all scores are above the threshold.
    """
    others = {s.id: s for s in kept(second)}
    both = [(a, others[a.id]) for a in kept(first) if a.id in others]
    if not both:
        return {"pairs": 0}
    means = [(_mean(a), _mean(b)) for a, b in both]
    correlation = _correlation(_ranks([a for a, _ in means]), _ranks([b for _, b in means]))
    return {
        "pairs": len(both),
        "correlation": None if correlation is None else round(correlation, 4),
        "difference": round(sum(b - a for a, b in means) / len(both), 4),
        "same_verdict": round(sum(_passes(a, threshold) == _passes(b, threshold) for a, b in both) / len(both), 4),
    }


def _asked(scores: Scores) -> list[Score]:
    return [s for s in (scores.quality, scores.following) if s is not None]


def _mean(scores: Scores) -> float:
    values = [s.value for s in _asked(scores)]
    return sum(values) / len(values)


def _passes(scores: Scores, threshold: float) -> bool:
    return all(s.value > threshold for s in _asked(scores))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end + 1) / 2
        start = end
    return ranks


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else None
