"""Each guard at its limit and just below it."""

import pytest
from scripted_backend import SilentReporter

from isheep_jax.config import GuardConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.guards import check, novelty
from isheep_jax.loop.records import KEPT, Instruction, dropped

LIMITS = {"min_novelty": 0.05, "min_score_mass": 0.5, "min_yield": 0.02}


def said(name, value, fresh=True, **settings):
    reporter = SilentReporter()
    check(GuardConfig(**settings), name, value, hint="try x", iteration=2, fresh=fresh, reporter=reporter)
    return reporter.lines


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_below_the_limit_a_person_is_warned_and_at_it_not(name, limit):
    (line,) = said(name, limit - 0.001)
    assert line.startswith("iteration 2: ")
    assert f"{limit - 0.001:.3f}" in line
    assert line.endswith("; try x")
    assert said(name, limit) == []
    assert said(name, None) == []


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_below_the_limit_the_run_stops_if_it_is_to_and_says_how_to_go_on(name, limit):
    with pytest.raises(UserError, match=rf"iteration 2: .*lower guard.{name} \(now {limit:g}\) or guard.action=warn"):
        said(name, limit - 0.001, fresh=False, action="stop")
    assert said(name, limit, action="stop") == []


def test_a_guard_that_is_off_says_nothing_and_a_resumed_run_is_not_warned_again():
    assert said("min_score_mass", 0.0, action="off") == []
    assert said("min_score_mass", 0.0, fresh=False) == []


def test_novelty_is_of_the_instructions_that_were_compared():
    def record(verdict):
        return Instruction("x", "", "", 0, (), verdict)

    others = [record(dropped("unfinished")), record(dropped("more than needed"))]
    assert novelty([record(KEPT)] + 3 * [record(dropped("not new"))] + others) == 0.25
    assert novelty(others) is None
