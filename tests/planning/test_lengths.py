"""Drawn lengths have the mean and the limit that they are drawn for."""

import math

import numpy as np
import pytest

from isheep_jax.planning.lengths import Lengths, draw, draw_endless, mean_endless


@pytest.mark.parametrize("mean", [16, 250, 900])
def test_mean_is_kept_where_long_texts_are_cut(mean):
    drawn = draw(mean, 4000, Lengths(), most=1000)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.max() == 1000 or mean == 16
    assert drawn.min() >= 1


def test_few_responses_take_all_the_tokens_that_they_may():
    drawn = draw(250, 10_000, Lengths(), most=1000)
    assert 0.02 < (drawn == 1000).mean() < 0.04
    assert np.median(drawn) < 250


def test_mean_above_limit_is_limit():
    assert set(draw(300, 5, Lengths(), most=16)) == {16}


def test_order_depends_on_seed_and_purpose_but_lengths_do_not():
    first, second = draw(250, 100, Lengths()), draw(250, 100, Lengths(seed=1))
    assert list(first) != list(second) != list(draw(250, 100, Lengths(), purpose=1))
    assert sorted(first) == sorted(second)
    assert list(first) == list(draw(250, 100, Lengths()))


def test_lists_mostly_go_on_until_they_are_cut():
    drawn = draw_endless(1000, 2000, Lengths())
    assert (drawn == 1000).mean() == pytest.approx(Lengths().endless)
    assert drawn.mean() == pytest.approx(mean_endless(1000, Lengths()), rel=0.01)
    assert math.isclose(draw_endless(1000, 1, Lengths(endless=1.0)).mean(), 1000)
