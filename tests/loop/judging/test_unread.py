"""A judge without scores is noticed after its first judgments."""

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop.judging.readings import UNSCORED
from isheep_jax.loop.judging.unread import FIRST, Unread
from isheep_jax.loop.records import KEPT, Score, Scores, dropped

READ = Scores("a", Score(8.0), Score(8.0), KEPT)
UNREAD = Scores("a", Score(8.0), Score(None, text="I think\x1b[2J it is good"), dropped(UNSCORED))


def watch(scores, *, server):
    """Returns the warnings."""
    said = []
    unread = Unread(said.append, server=server)
    for each in scores:
        unread.take(each)
    unread.end()
    return said


def test_most_of_the_first_judgments_without_a_score_are_a_warning_that_shows_one():
    (line,) = watch([READ, *[UNREAD] * FIRST * 3], server=True)
    assert f"{FIRST - 1} of the first {FIRST} pairs have no score of the judge" in line
    assert line.endswith(r", such as 'I think\x1b[2J it is good'")


def test_a_server_without_any_score_is_not_asked_further():
    taken = []
    with pytest.raises(UserError, match=f"first {FIRST} pairs begins with a score, such as 'I think"):
        watch((taken.append(1) or UNREAD for _ in range(1000)), server=True)
    assert len(taken) == FIRST
    with pytest.raises(UserError, match="first 3 pairs"):
        watch([UNREAD] * 3, server=True)


def test_a_model_of_this_machine_costs_nothing_and_goes_on():
    assert len(watch([UNREAD] * 1000, server=False)) == 1


@pytest.mark.parametrize("count", [0, 3, 1000])
def test_a_few_judgments_without_a_score_are_left_to_the_end_of_the_stage(count):
    assert watch([READ, READ, UNREAD, *[READ] * count], server=True) == []
