"""Expected scores against enumeration by hand, and against 100,000 sampled judgments of the same scripted judge."""

import functools
import itertools
import math
import random

import pytest

from isheep_jax.config import AssessConfig, Config, SelectConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion
from isheep_jax.loop.judging.scores import expected_score, parse_score, probability_above, sampled_score
from isheep_jax.loop.records import KEPT, Pair, Scores
from isheep_jax.loop.selection.select import select

SAMPLES = 100_000
# Five standard errors: a right implementation fails once in 1.7 million seeds.
ERRORS = 5

# What a judge writes: probabilities of the scores 1 to 10. What is missing to 1 is judgments without a number.
JUDGES = {
    "decided": (0, 0, 0, 0, 0, 0, 0.02, 0.08, 0.7, 0.2),
    "undecided": (0.1,) * 10,
    "two minds": (0.45, 0, 0, 0, 0, 0, 0, 0, 0, 0.45),
    "mostly silent": (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.04, 0.03, 0.02, 0.01),
    "skewed": (0.02, 0.03, 0.05, 0.1, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05),
}  # fmt: skip


def read(probabilities):
    return expected_score(ChoiceLogprobs("x", tuple(math.log(p) if p else -math.inf for p in probabilities)))


def judgments(name, count, seed):
    """Texts of a judge's sampled judgments; without a number as often as its probabilities leave it."""
    texts = [f" {n}||because" for n in range(1, 11)] + ["It is good."]
    weights = [*JUDGES[name], max(0.0, 1 - sum(JUDGES[name]))]
    return random.Random(f"{seed}/{name}").choices(texts, weights, k=count)


@functools.cache
def sampled(name, seed=0):
    """The scores (or None) of a judge's 100,000 judgments, as the loop parses them."""
    return [parse_score(text) for text in judgments(name, SAMPLES, seed)]


def within(mean, spread, count, value):
    """Whether a mean over `count` draws of standard deviation `spread` is as near to `value` as it should be."""
    # Recorded probabilities have four places.
    return abs(mean - value) <= ERRORS * spread / math.sqrt(count) + 1e-4 * 10


def moments(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@pytest.mark.parametrize(
    ("probabilities", "value", "mass", "above_8"),
    [
        # 0.02 * 7 + 0.08 * 8 + 0.7 * 9 + 0.2 * 10
        (JUDGES["decided"], 9.08, 1.0, 0.9),
        # (1 + 2 + ... + 10) / 10
        (JUDGES["undecided"], 5.5, 1.0, 0.2),
        # (1 + 10) / 2; two of ten judgments have no number
        (JUDGES["two minds"], 5.5, 0.9, 0.5),
        # symmetric about 6: 0.02 + 0.06 + 0.12 + 0.2 + 0.3 + 0.28 + 0.24 + 0.18 + 0.1 = 1.5 of 0.25
        (JUDGES["mostly silent"], 6.0, 0.25, 0.12),
        # 0.02 + 0.06 + 0.15 + 0.4 + 0.5 + 0.9 + 1.4 + 1.2 + 0.9 + 0.5 = 6.03 of 0.95
        (JUDGES["skewed"], 6.03 / 0.95, 0.95, 0.15 / 0.95),
    ],
)
def test_the_expected_score_is_what_enumeration_by_hand_gives(probabilities, value, mass, above_8):
    score = read(probabilities)
    assert score.value == pytest.approx(value, abs=1e-4)
    assert score.mass == pytest.approx(mass, abs=1e-4)
    assert probability_above(score, 8) == pytest.approx(above_8, abs=2e-4)


@pytest.mark.parametrize("name", JUDGES)
def test_the_mean_of_sampled_judgments_comes_to_the_expected_score(name):
    numbers = [n for n in sampled(name) if n is not None]
    mean, spread = moments(numbers)
    assert within(mean, spread, len(numbers), read(JUDGES[name]).value)
    # The loop's own mean of them is the same number.
    score = sampled_score([Completion("x", text) for text in judgments(name, SAMPLES, 0)])
    assert score.value == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("name", JUDGES)
def test_the_mass_is_the_share_of_judgments_that_have_a_score(name):
    share = sum(n is not None for n in sampled(name)) / SAMPLES
    mass = read(JUDGES[name]).mass
    assert within(share, math.sqrt(mass * (1 - mass)), SAMPLES, mass)


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("threshold", [0, 5, 8, 8.5, 9])
def test_the_probability_above_a_threshold_is_the_share_of_scores_above_it(name, threshold):
    numbers = [n for n in sampled(name) if n is not None]
    share = sum(n > threshold for n in numbers) / len(numbers)
    p = probability_above(read(JUDGES[name]), threshold)
    assert within(share, math.sqrt(p * max(1 - p, 0)), len(numbers), p)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("decided", (0, 0, 0, 0, 0, 0, 0.04, 0.08, 0.68, 0.2)),
        ("undecided", (0.11, *[0.1] * 8, 0.09)),
        ("two minds", (0.46, 0, 0, 0, 0, 0, 0, 0, 0, 0.44)),
        ("mostly silent", (0, 0.01, 0.02, 0.03, 0.04, 0.03, 0.06, 0.03, 0.02, 0.01)),
        ("skewed", (0.03, 0.03, 0.05, 0.1, 0.1, 0.15, 0.2, 0.15, 0.1, 0.04)),
    ],
)
def test_a_distribution_that_is_a_little_wrong_is_told_apart(name, wrong):
    numbers = [n for n in sampled(name) if n is not None]
    mean, spread = moments(numbers)
    assert not within(mean, spread, len(numbers), read(wrong).value)


def pairs(count):
    return [Pair(f"1-{i:06d}-0", f"1-{i:06d}", f"Do thing {i} well now.", "", "Done.", KEPT) for i in range(count)]


def test_the_probability_of_passing_is_how_often_the_papers_rule_keeps_the_pair():
    # Every pair of judges, the one for quality and the other for following.
    both = list(itertools.product(JUDGES, JUDGES))
    config = Config(assess=AssessConfig(read="expected"), select=SelectConfig(rule="none"))
    scores = [Scores(p.id, read(JUDGES[q]), read(JUDGES[f]), KEPT) for p, (q, f) in zip(pairs(len(both)), both)]
    for record, (q, f) in zip(select(config, 1, pairs(len(both)), scores), both, strict=True):
        numbers = [[n for n in sampled(*judge) if n is not None] for judge in ((q, "quality"), (f, "following"))]
        passed = [a > 8 and b > 8 for a, b in zip(*numbers)]
        p = record.above
        assert within(sum(passed) / len(passed), math.sqrt(p * (1 - p)), len(passed), p), (q, f)


def test_the_rule_itself_keeps_as_many_sampled_pairs_as_their_probabilities_add_up_to():
    # One sampled judgment per criterion, through the loop's own reading and selection, for 2,000 pairs.
    count, both = 2000, list(itertools.product(JUDGES, JUDGES))
    chances, scores = [], []
    streams = [{name: iter([n for n in sampled(name, which) if n]) for name in JUDGES} for which in ("first", "second")]
    for i, pair in enumerate(pairs(count)):
        names = both[i % len(both)]
        # The next judgment that has a number: what the probability is conditional on.
        found = [sampled_score([Completion("x", f"{next(streams[k][n])}||")]) for k, n in enumerate(names)]
        chances.append(math.prod(probability_above(read(JUDGES[name]), 8) for name in names))
        scores.append(Scores(pair.id, *found, KEPT))
    config = Config(assess=AssessConfig(read="sampled"), select=SelectConfig(max_pairs=count))
    kept = sum(record.verdict.kept for record in select(config, 1, pairs(count), scores))
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(kept - sum(chances)) <= ERRORS * spread + 1e-4 * count
