"""How far two judges agree on a random sample of pairs."""

import math
import random
from collections.abc import Sequence

from isheep_jax.config import Config
from isheep_jax.loop.judging.reader import Candidate
from isheep_jax.loop.records import Score, Scores, kept
from isheep_jax.loop.selection.ranking import places, rank


def sample_candidates(config: Config, iteration: int, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the pairs that two judges read: `assess.agreement` of them at random, in the order of generation."""
    rng = random.Random(f"{config.seed}/{iteration}/agreement")
    count = min(config.assess.agreement, len(candidates))
    return [candidates[i] for i in sorted(rng.sample(range(len(candidates)), count))]


def measure_agreement(
    config: Config, candidates: Sequence[Candidate], first: Sequence[Scores], second: Sequence[Scores]
) -> dict:
    """Returns how far two judges agree on the pairs that both of them read.

    The result has `pairs` (their number) and `correlation` (Spearman's, of what the pairs are ranked by; None if one
    judge says the same of all). With the rubric it also has `difference` (mean of the second judge's mean score minus
    the first's) and `same_verdict` (share of the pairs, 0 to 1, for which both judges have all scores above the
    threshold, or both do not).
    """
    others = {s.id: s for s in kept(second)}
    both = [(a, others[a.id]) for a in kept(first) if a.id in others]
    if not both:
        return {"pairs": 0}
    pairs = [candidate for candidate in candidates if candidate.id in others]
    readings = config.assess.readings
    one, other = (rank(config.select, readings, pairs, records).numbers for records in zip(*both))
    correlation = spearman(*([numbers[a.id] for a, _ in both] for numbers in (one, other)))
    result = {"pairs": len(both), "correlation": None if correlation is None else round(correlation, 4)}
    if "rubric" not in readings:
        return result
    threshold = config.select.threshold
    return result | {
        "difference": round(sum(_mean(b) - _mean(a) for a, b in both) / len(both), 4),
        "same_verdict": round(sum(_passes(a, threshold) == _passes(b, threshold) for a, b in both) / len(both), 4),
    }


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Returns the rank correlation of two lists of the same length; None where one of them is constant or empty."""
    return _correlation(places(x), places(y)) if x else None


def _given(scores: Scores) -> list[Score]:
    return [s for s in (scores.quality, scores.following) if s is not None]


def _mean(scores: Scores) -> float:
    values = [s.value for s in _given(scores)]
    return sum(values) / len(values)


def _passes(scores: Scores, threshold: float) -> bool:
    return all(s.value > threshold for s in _given(scores))


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else None
