import math

import pytest

from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion
from isheep_jax.loop.judging.scores import criteria_of, expected_score, median_mass, probability_above, sampled_score
from isheep_jax.loop.records import KEPT, Score, Scores


def test_the_expected_score_is_the_mean_of_the_models_distribution():
    probabilities = [0.0, 0, 0, 0, 0.1, 0, 0, 0.2, 0, 0.1]
    logs = tuple(math.log(p) if p else -math.inf for p in probabilities)
    score = expected_score(ChoiceLogprobs("x", logs))
    assert score.value == pytest.approx((5 * 0.1 + 8 * 0.2 + 10 * 0.1) / 0.4, abs=1e-4)
    assert score.mass == pytest.approx(0.4, abs=1e-4)
    assert score.argmax == 8
    assert probability_above(score, 8) == pytest.approx(0.25)
    assert probability_above(score, 7.9) == pytest.approx(0.75)


def test_tiny_probabilities_do_not_underflow():
    score = expected_score(ChoiceLogprobs("x", tuple(-2000.0 - (n == 9) for n in range(10))))
    assert score.value == pytest.approx(sum(range(1, 10)) / 9, abs=0.2)
    assert score.mass == 0


def test_no_answer_is_no_score():
    assert expected_score(ChoiceLogprobs("x", error="too long")) == Score(None, text="too long")
    assert expected_score(ChoiceLogprobs("x", (-math.inf,) * 10)).value is None
    assert sampled_score([Completion("x", "great")]) == Score(None, text="great")
    assert sampled_score([Completion("x", " 9||great")]) == Score(9.0, 9, text="9||great")
    assert probability_above(Score(9.0, 9), 8) is None


def test_several_judgments_are_their_mean_over_those_with_a_number():
    texts = [" 8||a", "none", "9||b", " 8"]
    assert sampled_score([Completion("x", t) for t in texts]) == Score(8.3333, 8, text="8||a\nnone\n9||b\n8")
    assert sampled_score([Completion("x", t) for t in ("9", "7", "7", "9")]).argmax == 7
    assert sampled_score([Completion("x", t) for t in ("bad", "worse")]).value is None


@pytest.mark.parametrize(
    ("level", "prompt", "templates"),
    [
        ("both", "standard", {"quality": "quality", "following": "following"}),
        ("quality", "standard", {"quality": "quality"}),
        ("following", "simple", {"following": "following_simple"}),
        ("both", "joint", {"quality": "joint"}),
        ("both", "few_shot", {"quality": "few_shot"}),
    ],
)
def test_only_the_scores_of_the_level_are_asked_for(level, prompt, templates):
    assert criteria_of(AssessConfig(level=level, prompt=prompt)) == templates
    assert criteria_of(AssessConfig(readings=("lift",), level=level, prompt=prompt)) == {}


def test_the_median_mass_is_over_the_scores_that_have_one():
    def scores(*masses):
        return Scores("x", *(m and Score(5.0, mass=m) for m in masses), KEPT)

    assert median_mass([scores(0.2, 0.9), scores(0.4, None)]) == 0.4
    assert median_mass([Scores("x", Score(9.0), None, KEPT)]) is None
