"""Short answers: taken out of responses as documented, and compared as the official scripts compare them."""

import pytest

from isheep_jax.evaluation.answers import (
    contains_answer,
    exact_match,
    f1,
    short_answer,
    squad_normalized,
    triviaqa_normalized,
)

# An answer, the right ones, and (EM, F1) as the official scripts of SQuAD 1.1, SQuAD 2.0 and TriviaQA 1.0 compute them.
OFFICIAL = [
    ("The Blue  Mill", ["blue mill"], (1, 1), (1, 1), (1, 1)),
    ("blue-mill", ["blue mill"], (0, 0), (0, 0), (1, 1)),
    ("bluemill", ["blue-mill"], (1, 1), (1, 1), (0, 0)),
    ("a red mill by the sea", ["the mill by the river", "red mill"], (0, 2 / 3), (0, 2 / 3), (0, 2 / 3)),
    ("the the", ["a"], (1, 0), (1, 1), (1, 0)),
    ("", ["mill"], (0, 0), (0, 0), (0, 0)),
    ("red red mill", ["red mill mill"], (0, 2 / 3), (0, 2 / 3), (0, 2 / 3)),
    ("O’Neil's mill", ["oneils mill"], (0, 0.5), (0, 0.5), (0, 1 / 3)),
    ("O’Neil’s mill", ["O’Neil s mill"], (0, 0.4), (0, 0.4), (1, 1)),
    ("mill_pond", ["mill pond"], (0, 0), (0, 0), (1, 1)),
    ("12,000", ["12000", "12 000"], (1, 1), (1, 1), (1, 1)),
    ("Ünal", ["ünal"], (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize(("answer", "right", "squad", "squad_v2", "triviaqa"), OFFICIAL)
def test_em_and_f1_equal_the_official_scripts(answer, right, squad, squad_v2, triviaqa):
    def both(normalized, **settings):
        return exact_match(answer, right, normalized), f1(answer, right, normalized, **settings)

    assert both(squad_normalized) == pytest.approx(squad)
    # The official script of 2.0 leaves out right answers without words, and compares with "" where none remain.
    worded = [gold for gold in right if squad_normalized(gold)]
    if worded:
        assert both(squad_normalized, empty_is_answer=True) == pytest.approx(squad_v2)
    assert both(triviaqa_normalized) == pytest.approx(triviaqa)


def test_no_answer_is_right_only_where_it_may_be():
    assert f1("", [""], squad_normalized, empty_is_answer=True) == 1
    assert f1("the", [""], squad_normalized, empty_is_answer=True) == 1
    assert f1("mill", [""], squad_normalized, empty_is_answer=True) == 0
    assert f1("", [""], squad_normalized) == 0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Paris", "Paris"),
        ("\n  Paris  \nIt is the capital.", "Paris"),
        ("Answer: Paris", "Paris"),
        ("A: Paris", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("**Paris**", "Paris"),
        ("The answer is Paris.", "Paris."),
        ("The correct answer is: Paris", "Paris"),
        ("The answer to this question is: Paris", "Paris"),
        ("Final answer: `Paris`", "Paris"),
        ("Answer:\nParis", "Paris"),
        ("A tale of two cities", "A tale of two cities"),
        ("The answer isn't known", "The answer isn't known"),
        ("An answer: Paris", "An answer: Paris"),
        ("It is Paris.", "It is Paris."),
        ("", ""),
        (" \n", ""),
    ],
)
def test_short_answer_is_the_first_line_without_label(response, answer):
    assert short_answer(response) == answer


def test_an_answer_is_contained_as_whole_words():
    assert contains_answer("It was Mercury, the metal.", ["mercury"], triviaqa_normalized) == 1
    assert contains_answer("The mercurial one", ["mercury", "one metal"], triviaqa_normalized) == 0
    assert contains_answer("", ["", "the"], triviaqa_normalized) == 0
