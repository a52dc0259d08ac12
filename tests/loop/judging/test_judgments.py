"""What base models write when they are asked for a score, and the number that is read from it.

Each row is a judgment, the number wanted by either parser, and why. The numbers are written by hand.
"""

import time

import pytest

from isheep_jax.config import AssessConfig
from isheep_jax.loop.judging.scores import parse_score

# A judgment, what 'strict' reads, what 'paper' reads, why.
JUDGMENTS = [
    # Both read the number.
    (" 8||good", 8, 8, "the form"),
    ("8", 8, 8, "the number alone"),
    ("\n\n 8 || good", 8, 8, "new lines first"),
    ("10||", 10, 10, "two digits"),
    ("1||bad", 1, 1, "the lowest"),
    ("8/10||good", 8, 8, "out of ten"),
    ("8 / 10", 8, 8, "out of ten, with spaces"),
    ("9 out of 10, because", 9, 9, "out of ten, in words"),
    ("9 of 10", 9, 9, "out of ten, shorter"),
    ("8.", 8, 8, "a sentence"),
    ("8...", 8, 8, "dots"),
    ("9, because it is right", 9, 9, "a comma behind it"),
    ("8 - good", 8, 8, "a dash before the reason"),
    ("8\n1. It is right.", 8, 8, "a list of reasons"),
    ("9 to be fair", 9, 9, "'to' without a second number"),
    ("08||", 8, 8, "a leading zero"),
    ("**8**", 8, 8, "bold"),
    ("`8`", 8, 8, "code"),
    ('"8"', 8, 8, "quotes"),
    ("“8”", 8, 8, "other quotes"),
    ("(8)", 8, 8, "brackets"),
    ("[[8]]", 8, 8, "the brackets of another benchmark"),
    (": 8||good", 8, 8, "a colon after the prompt"),
    ("８||好", 8, 8, "a full-width digit"),
    ("8分", 8, 8, "a score with its unit in Chinese"),
    ("7.4||", 7, 7, "rounded down"),
    ("7.6||", 8, 8, "rounded up"),
    ("9.5||", 10, 10, "half, to the even number and up alike"),
    # The authors' parser reads them otherwise.
    ("8.5||", 9, 8, "halves go up; the authors' to the even number"),
    ("-3||bad", None, 3, "no scale has it"),
    ("- 8||good", None, 8, "a bullet or a minus"),
    ("||8", None, 8, "the reason's place"),
    ("<8>||good", None, 8, "brackets of a placeholder; '<8' alone would be 'less than 8'"),
    ("1-10 scale: 9", None, 1, "the scale, not the score"),
    ("1 to 10", None, 1, "the scale in words"),
    ("8–9", None, 8, "a range"),
    ("8 or 9", None, 8, "a choice"),
    ("4/5||good", None, 4, "out of five"),
    ("8/100", None, 8, "out of a hundred"),
    ("3 out of 5", None, 3, "out of five, in words"),
    ("8,5||", None, 8, "a decimal comma or a list"),
    ("8:30", None, 8, "a time"),
    ("8%", None, 8, "a percentage"),
    ("9th place", None, 9, "an ordinal"),
    ("3D model", None, 3, "a word"),
    ("1.2.3", None, 1, "a version"),
    ("0.8||", None, 1, "a scale up to one"),
    ("10.4", None, 10, "above the scale"),
    # Numbers that are no scores.
    ("8 points out of 100", None, 8, "out of a hundred, in words"),
    ("1. The answer is right. 2. It is short. Rating: 9", None, 1, "a list of reasons"),
    ("1. The answer is", None, 1, "a list that is cut"),
    ("1) Right. 2) Short.", None, 1, "a list with brackets"),
    ("8. Right. 9. Short.", None, 8, "a list that goes on"),
    ("3 things are wrong", None, 3, "a count"),
    ("3 Fehler", None, 3, "a count in German"),
    ("3 処", None, 3, "a count in Japanese"),
    ("2 points deducted", None, 2, "points of something else"),
    ("4 out of the 5", None, 4, "out of so many things"),
    ("4 of the points", None, 4, "out of what is no number"),
    ("8 out of 10 answers", None, 8, "ten things"),
    ("10/10/2024", None, 10, "a date"),
    ("8/10/12", None, 8, "another date"),
    ("5 stars", None, 5, "a scale of stars"),
    ("4★", None, 4, "a sign of stars"),
    ("8 €", None, 8, "an amount"),
    ("2 + 2 = 4", None, 2, "a sum"),
    ("8-bit", None, 8, "a compound word"),
    ("7, 8 or 9", None, 7, "a list of numbers"),
    ("1\n2\n3", None, 1, "the scale, one number a line"),
    ("8½", None, 8, "a fraction"),
    ("10 000", None, 10, "a thousand"),
    ("1_000", None, 1, "another thousand"),
    # What chat models write.
    ("8／１０", 8, 8, "out of ten, full-width"),
    ("Rating: **8**/10. The answer is right.", 8, None, "a label first"),
    ("**Rating:** 8", 8, None, "a bold label"),
    ("Score: 8", 8, None, "a plain label"),
    ("The score is 9", 9, None, "a short sentence"),
    ("## Final score (1-10): 8", 8, None, "a heading"),
    ('{"score": 8}', 8, None, "an object"),
    ("评分：8分", 8, None, "a label in Chinese"),
    ("Rating: 8 points out of 100", None, None, "a label, out of a hundred"),
    ("Rating: 1-10", None, None, "a label, the scale"),
    ("8 out of 10 because", 8, 8, "a reason"),
    ("8 (out of 10)", 8, 8, "out of ten, in brackets"),
    ("8 on a scale of 1 to 10", 8, 8, "the scale behind it"),
    ("8 on a scale of 1 to 100", None, 8, "another scale behind it"),
    ("8 points", 8, 8, "a unit"),
    ("8 out of ten", 8, 8, "out of ten, spelled out"),
    ("<think>It is 3 or 4.</think>\n\n8||fine", 8, None, "a thought first"),
    ("It is 3 or 4.\n</think>\n\n8||fine", 8, None, "a thought that the prompt begins"),
    ("<think>8 is", None, None, "a thought that is cut"),
    # None reads a number.
    ("", None, None, "nothing"),
    (" \n", None, None, "white space"),
    ("I'd rate it 7 out of 10", None, None, "the same"),
    ("ten", None, None, "a word"),
    ("八", None, None, "a word in Chinese"),
    ("Ⅷ||", None, None, "Roman"),
    ("0||bad", None, None, "below the scale"),
    ("11||great", None, None, "above the scale"),
    ("80||", None, None, "a scale to a hundred"),
    ("2024 is", None, None, "a year"),
    ("good||8", None, None, "the wrong way round"),
    ("N/A", None, None, "a refusal"),
    ("<|endoftext|>8", None, None, "text behind the end"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "strict", "paper", "why"), JUDGMENTS, ids=[row[3] for row in JUDGMENTS])
def test_a_judgment_counts_by_the_number_it_begins_with(text, strict, paper, why):
    assert (parse_score(text), parse_score(text, "paper")) == (strict, paper)


@pytest.mark.parametrize("text", ["9" * 64_000, "1" * 400, "8." * 32_000, "1 " * 32_000, "\n" * 64_000, "(" * 64_000])
@pytest.mark.parametrize("parser", ["strict", "paper"])
def test_judgments_without_end_are_read_at_once(text, parser):
    begun = time.monotonic()
    assert parse_score(text, parser) in (None, 1, 8, 9)
    assert time.monotonic() - begun < 5


def test_the_table_says_each_thing_once():
    assert len({row[0] for row in JUDGMENTS}) == len(JUDGMENTS)


def test_judgments_are_read_strictly_unless_the_paper_is_asked_for():
    assert AssessConfig().parser == "strict"
