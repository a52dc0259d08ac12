"""Two models are compared over their common samples, with intervals that know what belongs together."""

import json
import random

import numpy as np
import pytest
from evaluation_files import write_evaluation

from isheep_jax.errors import UserError
from isheep_jax.evaluation.comparison import Change, compare, compare_task, paired_difference, sign_test
from isheep_jax.evaluation.saved import find_evaluation


def evaluation(path, scores, **result):
    return find_evaluation(write_evaluation(path, scores, **result))


def strict(*values) -> dict[str, list[dict]]:
    return {str(n): [{"prompt_strict": value}] for n, value in enumerate(values)}


def compared(tmp_path, first, second, a=None, b=None):
    """Compares hand-made scores; `a` and `b` are further arguments of `write_evaluation`."""
    return compare_task(
        evaluation(tmp_path / "a", first, **(a or {})), evaluation(tmp_path / "b", second, **(b or {})), "ifeval"
    )


def test_identical_models_differ_by_exactly_nothing(tmp_path):
    rng = random.Random(0)
    scores = {str(n): [{"f1": rng.random(), "each": [rng.random() for _ in range(n % 3)]}] for n in range(50)}
    result = compared(tmp_path, scores, scores)
    assert result.changed == ()
    assert result.notes == ()
    for name, samples in (("f1", 50), ("each", 33)):
        difference = result.differences[name]
        assert (difference.difference, difference.low, difference.high, difference.p) == (0.0, 0.0, 0.0, 1.0)
        assert (difference.better, difference.worse, difference.samples) == (0, 0, samples)


def test_differences_are_those_of_the_figures(tmp_path):
    first = {"x": [{"each": [1, 0, 0]}], "y": [{"each": [1]}]}
    second = {"x": [{"each": [1, 1, 0]}], "y": [{"each": [0]}]}
    difference = compared(tmp_path, first, second).differences["each"]
    # Means over instructions, not over samples.
    assert (difference.a, difference.b, difference.difference) == (0.5, 0.5, 0.0)
    assert (difference.better, difference.worse) == (1, 1)


def test_of_a_loss_lower_is_better(tmp_path):
    a, b = ({str(n): [{"loss": [value, 1.0]}] for n, value in enumerate(values)} for values in ((2, 2, 2), (1, 1, 3)))
    result = compared(tmp_path, a, b, *[{"main": "loss", "loss": 1.5}] * 2)
    difference = result.differences["loss"]
    assert difference.difference == pytest.approx(-1 / 6)
    assert (difference.better, difference.worse) == (2, 1)
    assert [(change.sample, change.gain) for change in result.changed] == [("2", -0.5), ("0", 0.5), ("1", 0.5)]


def test_sign_of_the_difference_is_that_of_the_second_model(tmp_path):
    result = compared(tmp_path, strict(*[0] * 40), strict(*[1] * 10, *[0] * 30))
    difference = result.differences["prompt_strict"]
    assert difference.difference == 0.25
    assert 0.1 < difference.low < 0.25 < difference.high < 0.4
    assert (difference.better, difference.worse, difference.p) == (10, 0, 2 / 2**10)


def test_interval_is_that_of_the_normal_approximation_for_many_samples():
    rng = np.random.default_rng(1)
    a, b = ({str(n): [value] for n, value in enumerate(rng.normal(size=2000))} for _ in range(2))
    difference = paired_difference(a, b, list(a))
    gains = np.array([b[s][0] - a[s][0] for s in a])
    half = 1.96 * gains.std(ddof=1) / np.sqrt(2000)
    assert np.allclose([difference.low, difference.high], [gains.mean() - half, gains.mean() + half], atol=0.1 * half)


def test_pairing_narrows_and_clustering_widens_the_interval():
    rng = random.Random(2)
    hard = [rng.random() < 0.5 for _ in range(100)]
    a = {str(n): [float(value)] for n, value in enumerate(hard)}
    paired = {str(n): [float(value != (n % 10 == 0))] for n, value in enumerate(hard)}
    shuffled = dict(zip(a, rng.sample(list(paired.values()), 100), strict=True))

    def width(first, second):
        difference = paired_difference(first, second, list(first))
        return difference.high - difference.low

    assert width(a, paired) < 0.7 * width(a, shuffled)
    # Eight attempts that always agree are worth one.
    eight = [{s: value * 8 for s, value in model.items()} for model in (a, paired)]
    assert width(*eight) == width(a, paired)
    apart = [{f"{s} {k}": value for s, value in model.items() for k in range(8)} for model in (a, paired)]
    assert width(*eight) > 2 * width(*apart)


def test_the_same_comparison_gives_the_same_figures_whatever_the_block(monkeypatch):
    rng = random.Random(3)
    a, b = ({str(n): [rng.random()] for n in range(30)} for _ in range(2))
    first = paired_difference(a, b, list(a))
    assert paired_difference(a, b, list(a)) == first
    monkeypatch.setattr("isheep_jax.evaluation.comparison.BLOCK", 30 * 7)
    assert paired_difference(a, b, list(a)) == first


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (6, 0, 2 / 64), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_sign_test_is_exact(better, worse, p):
    assert sign_test(better, worse) == sign_test(worse, better) == p


def test_sign_test_of_thousands_is_a_number():
    assert 0 < sign_test(9000, 8700) < 0.05
    assert sign_test(9000, 0) == 0.0


def test_changed_samples_come_with_both_answers_the_worse_ones_first(tmp_path):
    result = compared(
        tmp_path,
        strict(0, 1, 1, 0),
        strict(1, 0, 1, 0),
        a={"responses": {"1": "good"}},
        b={"responses": {"1": "bad"}},
    )
    assert [(c.sample, c.score_a, c.score_b) for c in result.changed] == [("1", 1.0, 0.0), ("0", 0.0, 1.0)]
    assert result.changed[0] == Change("1", "Question 1?", 1.0, 0.0, -1.0, "good", "bad", {"n": 0}, {"n": 0})
    assert json.loads(json.dumps(result.as_dict()))["changed"][0]["prompt"] == "Question 1?"


def test_only_common_samples_count_when_limits_differ(tmp_path):
    def settings(samples):
        return {"settings": {"samples": samples, "of": 4, "prompts": f"of {samples}", "references": f"of {samples}"}}

    result = compared(tmp_path, strict(0, 1, 1, 0), strict(1, 0), a=settings(4), b=settings(2))
    assert (result.samples, result.only_a, result.only_b, result.notes) == (2, 2, 0, ())
    assert result.differences["prompt_strict"].a == 0.5


def test_samples_with_other_prompts_are_left_out(tmp_path):
    result = compared(tmp_path, strict(0, 1), strict(1, 1), b={"prompts": {"0": "Something else?"}})
    assert (result.samples, result.differences["prompt_strict"].difference) == (1, 0.0)
    assert result.notes == ("left out because their prompts differ: 1 of 2 samples",)


def test_prompts_of_another_format_are_compared_and_told(tmp_path):
    result = compared(
        tmp_path,
        strict(0, 1),
        strict(1, 1),
        b={"prompts": {"0": "Q: 0\nA:", "1": "Q: 1\nA:"}, "settings": {"prompt_format": "completion"}},
    )
    assert result.samples == 2
    assert result.notes == ("evaluated with different settings: prompt_format chat and completion",)


def test_other_versions_are_refused_and_named(tmp_path):
    with pytest.raises(UserError, match=r"has version 1 of the task and .* version 2"):
        compared(tmp_path, strict(1), strict(1), b={"version": 2})


def test_other_settings_are_told(tmp_path):
    a, b = (
        {"settings": {"weights": name, "references": name, "dtype": name * 50, "chat_template": digest}}
        for name, digest in (("x", "0f" * 32), ("y", ""))
    )
    (note,) = compared(tmp_path, strict(1), strict(1), a=a, b=b).notes
    assert note == (
        "evaluated with different settings: references x and y; "
        f"dtype {'x' * 37}... and {'y' * 37}...; chat_template 0f0f0f0f and none"
    )


def test_sampling_parameters_that_differ_are_told_by_name(tmp_path):
    a, b = (
        {"settings": {"sampling": [{"temperature": 0, "max_tokens": n, "stop": stop}]}}
        for n, stop in ((64, []), (32, ["\n"]))
    )
    (note,) = compared(tmp_path, strict(1), strict(1), a=a, b=b).notes
    assert note == "evaluated with different settings: max_tokens 64 and 32; stop none and ['\\n']"


def test_other_scoring_is_refused_and_named(tmp_path):
    with pytest.raises(UserError, match=r"scored differently \(judge one and other\)"):
        compared(tmp_path, strict(1), strict(1), a={"scoring": {"judge": "one"}}, b={"scoring": {"judge": "other"}})


def test_models_without_a_common_sample_are_refused(tmp_path):
    with pytest.raises(UserError, match="no sample with the same prompt and a score in common"):
        compared(tmp_path, strict(1), {"other": [{"prompt_strict": 1}]})


def test_tasks_that_cannot_be_compared_do_not_stop_the_others(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for path, version in ((a, 1), (b, 2)):
        write_evaluation(path, strict(1, 0))
        write_evaluation(path, strict(1, 0), task="squad", version=version)
    comparisons, refused = compare(find_evaluation(a), find_evaluation(b))
    assert [result.task for result in comparisons] == ["ifeval"]
    assert len(refused) == 1
    assert refused[0].startswith("squad is not compared: ")
    with pytest.raises(UserError, match="squad is not compared"):
        compare(find_evaluation(a), find_evaluation(b), ["squad"])


def test_models_without_a_common_task_are_refused(tmp_path):
    a = evaluation(tmp_path / "a", strict(1))
    b = evaluation(tmp_path / "b", strict(1), task="squad")
    with pytest.raises(UserError, match=r"a has ifeval, .*b has squad"):
        compare(a, b)
    with pytest.raises(UserError, match="no task of mbpp"):
        compare(a, a, ["mbpp"])
