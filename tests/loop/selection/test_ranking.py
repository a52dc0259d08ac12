"""What pairs are ranked by, against numbers worked out by hand."""

import math

import pytest

from isheep_jax.config import SelectConfig
from isheep_jax.loop.records import KEPT, Pair, ReadingValue, Score, Scores, dropped
from isheep_jax.loop.selection.ranking import places, rank, standings


def make(*readings, lengths=None):
    """Pairs "0", "1", ... with readings given as {name: (value, tokens)}, whose responses have these lengths."""
    lengths = lengths or [10] * len(readings)
    pairs = [Pair(f"{i}", f"{i}", "Do it.", "", "x" * length, KEPT) for i, length in enumerate(lengths)]
    scores = [
        Scores(f"{i}", None, None, KEPT, {name: ReadingValue(*value) for name, value in each.items()})
        for i, each in enumerate(readings)
    ]
    return pairs, scores


def numbers(settings, names, pairs, scores):
    found = rank(settings, names, pairs, scores).numbers
    return [found.get(pair.id) for pair in pairs]


def test_equal_values_share_the_mean_of_their_places_and_half_their_standing():
    assert places([5, 1, 5, 0]) == [3.5, 2, 3.5, 1]
    assert standings({"a": 5, "b": 1, "c": 5, "d": 0}) == pytest.approx(
        {"a": 2.5 / 3, "b": 1 / 3, "c": 2.5 / 3, "d": 0}
    )
    assert standings({"a": 7.0}) == {"a": 0.0}


def test_a_log_likelihood_counts_per_token_or_in_total_and_what_is_no_sum_as_it_is():
    pairs, scores = make({"lift": (6.0, 2)}, {"lift": (8.0, 8)}, {"lift": (0.0, 0)})
    assert numbers(SelectConfig(), ("lift",), pairs, scores) == [3.0, 1.0, 0.0]
    assert numbers(SelectConfig(per="total"), ("lift",), pairs, scores) == [6.0, 8.0, 0.0]
    pairs, scores = make({"pairwise": (0.75,)}, {"pairwise": (0.25,)})
    assert numbers(SelectConfig(), ("pairwise",), pairs, scores) == [0.75, 0.25]


def test_the_rubric_counts_by_the_sum_of_its_scores_with_following_capped():
    pairs, _ = make({}, {})
    scores = [Scores("0", Score(6.0), Score(9.0), KEPT), Scores("1", Score(7.0), None, KEPT)]
    assert numbers(SelectConfig(following_ceiling=7.5), ("rubric",), pairs, scores) == [13.5, 7.0]


def test_readings_are_added_by_their_weighted_standing():
    values = [(1, -9), (2, -3), (30, -6)]
    pairs, scores = make(*({"lift": (a, 1), "likelihood": (b, 1)} for a, b in values))
    both = ("lift", "likelihood")
    # Standings 0, 1/2, 1 and 0, 1, 1/2; lift counts twice.
    assert numbers(SelectConfig(), both, pairs, scores) == pytest.approx([0, 2 / 3, 2.5 / 3])
    assert numbers(SelectConfig(weights=(1.0, 1.0)), both, pairs, scores) == [0, 0.75, 0.75]
    assert numbers(SelectConfig(weights=(3.0, 1.0)), both, pairs, scores) == pytest.approx([0, 2.5 / 4, 3.5 / 4])
    assert numbers(SelectConfig(weights=(0.0, 1.0)), both, pairs, scores) == [0, 1, 0.5]


def test_in_the_same_tenth_the_next_reading_decides():
    # Of 21 values the standings are 0, 0.05, ... 1: two of each tenth, and three in the last.
    pairs, scores = make(*({"lift": (n, 1), "likelihood": (-n, 1)} for n in range(21)))
    found = numbers(SelectConfig(ranking="lexicographic"), ("lift", "likelihood"), pairs, scores)
    order = sorted(range(21), key=lambda n: -found[n])
    assert order == [18, 19, 20, 16, 17, 14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1]
    assert all(0 <= number < 1 for number in found)


def test_a_regression_takes_out_exactly_what_grows_with_the_logarithm_of_the_length():
    lengths = [4, 16, 64, 256]
    extra = [1.0, -1.0, -1.0, 1.0]  # neither grows nor falls with the length
    pairs, scores = make(
        *({"lift": (5 + 3 * math.log(length) + more, 1)} for length, more in zip(lengths, extra)), lengths=lengths
    )
    settings = SelectConfig(length_control="regression")
    assert numbers(settings, ("lift",), pairs, scores) == pytest.approx(extra)
    pairs, scores = make({"lift": (5.0, 1)}, {"lift": (7.0, 1)})
    assert numbers(settings, ("lift",), pairs, scores) == [-1.0, 1.0]


def test_buckets_compare_with_those_of_about_the_same_length():
    # The longer the response the higher the value; within a length, the order is by the last digit.
    lengths = [10 * (1 + n // 20) for n in range(60)]
    pairs, scores = make(*({"lift": (100 * length + n % 20, 1)} for n, length in enumerate(lengths)), lengths=lengths)
    found = numbers(SelectConfig(length_control="buckets"), ("lift",), pairs, scores)
    assert found == pytest.approx([(n % 20) / 19 for n in range(60)])


def test_pairs_that_the_judge_dropped_are_ranked_by_nothing_and_move_no_other():
    pairs, scores = make({"lift": (1, 1)}, {"lift": (99, 1)}, {"lift": (3, 1)})
    scores[1] = Scores("1", None, None, dropped("repeats itself"), scores[1].readings)
    found = rank(SelectConfig(), ("lift", "lift"), pairs, scores)
    assert found.numbers.keys() == {"0", "2"}
    assert rank(SelectConfig(), ("lift",), pairs, []).numbers == {}


@pytest.mark.parametrize("control", ["none", "regression", "buckets"])
@pytest.mark.parametrize("ranking", ["sum", "lexicographic"])
def test_the_order_of_the_records_changes_nothing(control, ranking):
    values = [((n * 7) % 50, 5 + n % 3) for n in range(50)]
    pairs, scores = make(
        *({"lift": value, "pairwise": ((n * 3) % 50 / 50,)} for n, value in enumerate(values)),
        lengths=[1 + (n * n) % 91 for n in range(50)],
    )
    settings = SelectConfig(ranking=ranking, length_control=control)
    names = ("lift", "pairwise")
    assert rank(settings, names, pairs[::-1], scores[::-1]).numbers == rank(settings, names, pairs, scores).numbers
