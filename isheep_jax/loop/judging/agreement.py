"""How far two judges agree on a random sample of pairs."""

import math
import random
from collections.abc import Sequence

from isheep_jax.config import Config
from isheep_jax.loop.judging.reader import Candidate
from isheep_jax.loop.records import Score, Scores, kept


def sample_candidates(config: Config, iteration: int, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the pairs that two judges read: `assess.agreement` of them at random, in the order of generation."""
    rng = random.Random(f"{config.seed}/{iteration}/agreement")
    count = min(config.assess.agreement, len(candidates))
    return [candidates[i] for i in sorted(rng.sample(range(len(candidates)), count))]


def measure_agreement(first: Sequence[Scores], second: Sequence[Scores], threshold: float) -> dict:
    """Returns how far two judges agree on the pairs that both of them scored.

    The result has `pairs` (their number), `correlation` (Spearman's, of the mean scores; None if one judge gives equal
    scores only), `difference` (mean of the second judge's mean score minus the first's) and `same_verdict` (share of
    the pairs, 0 to 1, for which both judges have all scores above the threshold, or both do not).
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


def _given(scores: Scores) -> list[Score]:
    return [s for s in (scores.quality, scores.following) if s is not None]


def _mean(scores: Scores) -> float:
    values = [s.value for s in _given(scores)]
    return sum(values) / len(values)


def _passes(scores: Scores, threshold: float) -> bool:
    return all(s.value > threshold for s in _given(scores))


def _ranks(values: Sequence[float]) -> list[float]:
    """Returns ranks from 1; equal values share the mean of their ranks."""
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
