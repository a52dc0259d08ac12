"""What pairs are ranked by: the value of each reading, without the length of the response where asked, and all in one.

A log-likelihood counts per token or in total (`select.per`), and long responses differ from short ones in both. The
standing of a pair in a reading is the share of the other pairs below it, so that readings of any scale can be added.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from isheep_jax.config import SelectConfig
from isheep_jax.loop.judging.reader import Candidate
from isheep_jax.loop.judging.readings import READINGS
from isheep_jax.loop.records import Pair, ReadingValue, Scores, kept

# Pairs of about the same length, as few as this, are compared with each other.
_BUCKET = 20
# Highest perplexity; those above it are recorded as this one.
_HIGHEST = 1e9

Values = Mapping[str, float]


@dataclass(frozen=True)
class Ranking:
    """What the pairs are ranked by; a pair that the judge dropped is in none of them.

    values: final value of each reading by the pair's id, by reading. numbers: what each pair is ranked by.
    """

    values: Mapping[str, Values] = field(default_factory=dict)
    numbers: Values = field(default_factory=dict)


def rank(
    settings: SelectConfig, readings: Sequence[str], pairs: Sequence[Pair | Candidate], scores: Sequence[Scores]
) -> Ranking:
    """Returns what `select.ranking` makes of the readings of all pairs."""
    lengths = {pair.id: len(pair.response) for pair in pairs}
    control = LENGTH_CONTROLS[settings.length_control]
    known = {record.id: [_value(settings, name, record) for name in readings] for record in kept(scores)}
    known = {id: values for id, values in known.items() if None not in values}
    if not known or not readings:
        return Ranking()
    raw = {name: {id: values[i] for id, values in known.items()} for i, name in enumerate(readings)}
    values = {name: control(each, lengths) for name, each in raw.items()}
    return Ranking(values, _COMBINE[settings.ranking](settings, values))


def weights_of(settings: SelectConfig, readings: Sequence[str]) -> Sequence[float]:
    """Returns how much each reading counts in a sum: `select.weights`, or the usual weights."""
    return settings.weights or [READINGS[name].weight for name in readings]


def rubric_sum(settings: SelectConfig, scores: Scores) -> float | None:
    """Returns the sum of the scores of the rubric, following capped; None unless all that were asked for are there."""
    quality, following = (score and score.value for score in (scores.quality, scores.following))
    asked_for = [score for score in (scores.quality, scores.following) if score is not None]
    if not asked_for or any(score.value is None for score in asked_for):
        return None
    return round((quality or 0.0) + min(following or 0.0, settings.following_ceiling), 4)


def perplexity(reading: ReadingValue | None) -> float | None:
    """Returns exp of the mean negative log-probability per token, from the reading 'likelihood'; None without one."""
    if reading is None or reading.value is None or not reading.tokens:
        return None
    return round(math.exp(min(-reading.value / reading.tokens, math.log(_HIGHEST))), 4)


def standings(values: Values) -> dict[str, float]:
    """Returns the share of the others (0 to 1) that each value is above; equal values count half."""
    others = max(len(values) - 1, 1)
    return dict(zip(values, ((place - 1) / others for place in places(list(values.values())))))


def places(values: Sequence[float]) -> list[float]:
    """Returns the place of each value from the lowest, 1; equal values share the mean of their places."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            result[i] = (start + end + 1) / 2
        start = end
    return result


def _value(settings: SelectConfig, name: str, scores: Scores) -> float | None:
    if name == "rubric":
        return rubric_sum(settings, scores)
    reading = scores.readings[name]
    return reading.value / reading.tokens if settings.per == "token" and reading.tokens else reading.value


def _as_it_is(values: Values, lengths: Mapping[str, int]) -> Values:
    return values


def _above_the_line(values: Values, lengths: Mapping[str, int]) -> Values:
    """Returns what the values are above the straight line through them by the logarithm of the length."""
    x = {id: math.log(max(lengths[id], 1)) for id in values}
    mean_x, mean_y = (math.fsum(each.values()) / max(len(each), 1) for each in (x, values))
    spread = math.fsum((x[id] - mean_x) ** 2 for id in values)
    slope = math.fsum((x[id] - mean_x) * (values[id] - mean_y) for id in values) / spread if spread > 0 else 0.0
    return {id: value - mean_y - slope * (x[id] - mean_x) for id, value in values.items()}


def _among_equal_lengths(values: Values, lengths: Mapping[str, int]) -> Values:
    """Returns the standing of each value among those of the responses that are nearest in length."""
    order = sorted(values, key=lambda id: (lengths[id], id))
    count = max(1, len(order) // _BUCKET)
    cuts = [len(order) * i // count for i in range(count + 1)]
    within: dict[str, float] = {}
    for begin, end in itertools.pairwise(cuts):
        within |= standings({id: values[id] for id in order[begin:end]})
    return {id: within[id] for id in values}


LENGTH_CONTROLS: dict[str, Callable[[Values, Mapping[str, int]], Values]] = {
    "none": _as_it_is,
    "regression": _above_the_line,
    "buckets": _among_equal_lengths,
}


def _weighted(settings: SelectConfig, values: Mapping[str, Values]) -> Values:
    if len(values) == 1:
        return next(iter(values.values()))
    weights = weights_of(settings, list(values))
    parts = [standings(each) for each in values.values()]
    total = math.fsum(weights)
    return {id: math.fsum(w * part[id] for w, part in zip(weights, parts, strict=True)) / total for id in parts[0]}


def _in_tenths(settings: SelectConfig, values: Mapping[str, Values]) -> Values:
    """Returns numbers whose decimals are the tenths of one reading after the other; the last one has all of its own."""
    *coarse, fine = [standings(each) for each in values.values()]

    def number(id: str) -> float:
        tenths = [min(int(10 * part[id]), 9) for part in coarse]
        digits = math.fsum(tenth / 10 ** (i + 1) for i, tenth in enumerate(tenths))
        return digits + min(fine[id], 1 - 1e-9) / 10 ** len(coarse)

    return {id: number(id) for id in fine}


# Of 'probability' the sum decides among equals.
_COMBINE: dict[str, Callable[[SelectConfig, Mapping[str, Values]], Values]] = {
    "sum": _weighted,
    "lexicographic": _in_tenths,
    "probability": _weighted,
}
