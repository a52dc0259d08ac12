import pytest

from isheep_jax.decode.requests import Completion
from isheep_jax.loop.filters.verdicts import not_decoded, verdict_of
from isheep_jax.loop.records import KEPT, dropped


@pytest.mark.parametrize("reason", [None, "", "asks back"])
def test_an_incomplete_completion_is_dropped_whatever_its_text(reason):
    error = Completion("1", "", finish_reason="error", error="too long")
    assert verdict_of(error, reason) == not_decoded(error) == dropped("not decoded", "too long")
    assert verdict_of(Completion("1", "text", finish_reason="length"), reason) == dropped("unfinished")


def test_a_complete_one_is_dropped_for_its_reason_alone():
    complete = Completion("1", "text", finish_reason="stop")
    assert verdict_of(complete, "asks back") == dropped("asks back")
    assert verdict_of(complete, None) == verdict_of(complete, "") == KEPT
    assert not_decoded(complete) is None
