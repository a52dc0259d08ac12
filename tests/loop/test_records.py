import pytest

from isheep_jax.loop.records import KEPT, Instruction, Pair, Score, Scores, Selected, dropped, from_line, to_line

RECORDS = [
    Instruction("1-000000", "Sag \"hallo\"\u2028und\n'tschüss'", "", 3, ("seed-001", "seed-004"), KEPT),
    Pair("1-000000-1", "1-000000", "a", "b", "c", dropped("unfinished")),
    Scores("1-000000-1", Score(7.25, 7, 0.9, (0.1,) * 10), Score(None, text="bad"), dropped("unscored", "following")),
    Selected("1-000000-1", "1-000000", "a", "b", "c", 7.0, 8.0, 15.0, None, "1", KEPT),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_is_one_line_and_comes_back_equal(record):
    line = to_line(record)
    assert "\n" not in line
    assert from_line(type(record), line) == record


@pytest.mark.parametrize("line", ["", "{", "[]", '{"id": "1"}', "3"])
def test_what_is_not_a_record_is_refused(line):
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_line(Pair, line)
