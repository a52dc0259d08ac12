"""The length-controlled win rate: gold values by hand, and what lengths may and may not do."""

import numpy as np
import pytest

from isheep_jax.evaluation.length_control import length_controlled_win_rate


def test_lengths_that_are_always_equal_leave_the_win_rate_as_it_is():
    figure = length_controlled_win_rate([1.0, 0.0, 0.0, 0.5], [7, 8, 9, 10], [7, 8, 9, 10])
    assert (figure.value, figure.count) == (pytest.approx(0.375, abs=1e-4), 4)


def test_preferences_that_a_logistic_curve_makes_give_its_value_at_equal_lengths():
    """P = sigmoid(0.4 + 1.5 tanh(d / std(d))): the lengths explain a win rate of .72, and .60 remains without them."""
    difference = np.random.default_rng(0).normal(300.0, 400.0, 5000)
    preferences = 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(difference / difference.std()))))
    figure = length_controlled_win_rate(preferences, 1000 + difference, np.full(5000, 1000))
    assert preferences.mean() == pytest.approx(0.72, abs=0.02)
    assert figure.value == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.005)


def test_the_standard_error_is_that_of_repeated_samples():
    rng, values, errors = np.random.default_rng(1), [], []
    for _ in range(300):
        difference = rng.normal(200.0, 300.0, 400)
        p = 1 / (1 + np.exp(-(-0.3 + np.tanh(difference / 300.0))))
        figure = length_controlled_win_rate((rng.random(400) < p).astype(float), difference, np.zeros(400))
        values.append(figure.value)
        errors.append(figure.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


@pytest.mark.parametrize("preference", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_one_who_always_wins_or_loses_has_a_finite_figure(preference, count):
    figure = length_controlled_win_rate([preference] * count, list(range(count)), [5] * count)
    assert figure.value == pytest.approx(preference, abs=0.01)
    assert np.isfinite(figure.stderr)


def test_winning_by_length_alone_is_a_draw():
    """The longer response always wins, and either is the longer one as often."""
    lengths = [900, 1100] * 50
    figure = length_controlled_win_rate([float(n > 1000) for n in lengths], lengths, [1000] * 100)
    assert figure.value == pytest.approx(0.5, abs=1e-6)


def test_swapping_the_two_sides_gives_the_complement():
    rng = np.random.default_rng(2)
    preferences, own, other = rng.random(60), rng.integers(1, 900, 60), rng.integers(1, 900, 60)
    there = length_controlled_win_rate(preferences, own, other)
    back = length_controlled_win_rate(1 - preferences, other, own)
    assert (back.value, back.stderr) == (pytest.approx(1 - there.value), pytest.approx(there.stderr))


def test_few_preferences_cannot_claim_that_length_is_all_that_counts():
    """Ten losses of short responses: without a prior, the fit would call the winner of equally long ones open."""
    lengths = [10, 20, 30, 40, 50, 60, 70, 80, 1000, 1000]
    figure = length_controlled_win_rate([0.0] * 8 + [0.5] * 2, lengths, [1000] * 10)
    assert 0.1 < figure.value < 0.2
