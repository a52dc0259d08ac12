import json

import pytest

from isheep_jax.loop.records import (
    KEPT,
    Instruction,
    Pair,
    ReadingValue,
    Score,
    Scores,
    Selected,
    dropped,
    from_line,
    to_line,
)

RECORDS = [
    Instruction("1-000000", "Sag \"hallo\"\u2028und\n'tschüss'", "", 3, ("seed-001", "seed-004"), KEPT),
    Pair("1-000000-1", "1-000000", "a", "b", "c", dropped("unfinished")),
    Scores("1-000000-1", Score(7.25, 7, 0.9, (0.1,) * 10), Score(None, text="bad"), dropped("unscored", "following")),
    Scores("1-000000-1", None, Score(3.0, 3), KEPT),
    Scores("1-0-1", None, None, KEPT, {"lift": ReadingValue(-3.5, 4), "pairwise": ReadingValue(None, error="alone")}),
    Selected("1-000000-1", "1-000000", "a", "b", "c", 7.0, 8.0, 15.0, None, "1", KEPT),
    Selected("1-000000-1", "1-000000", "a", "b", "c", None, None, None, None, "1", KEPT, perplexity=3.0, cluster=0),
    Selected("1-0-1", "1-0", "a", "b", "c", None, None, None, None, "", KEPT, readings={"lift": 0.5}, ranked_by=0.5),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_is_one_line_and_comes_back_equal(record):
    line = to_line(record)
    assert "\n" not in line
    assert from_line(type(record), line) == record


def test_what_most_runs_have_no_use_for_is_not_in_the_line():
    plain, measured, read = (json.loads(to_line(r)) for r in RECORDS if isinstance(r, Selected))
    assert measured.keys() - plain.keys() == {"perplexity", "cluster"}
    assert read.keys() - plain.keys() == {"readings", "ranked_by"}
    assert "readings" not in json.loads(to_line(Scores("a", Score(3.0), None, KEPT)))
    assert plain["above"] is None


@pytest.mark.parametrize("line", ["", "{", "[]", '{"id": "1"}', "3"])
def test_what_is_not_a_record_is_refused(line):
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_line(Pair, line)
