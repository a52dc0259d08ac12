"""What an evaluation left is found by the names a user has, and damage is told in one line."""

import pytest
from evaluation_files import write_evaluation

from isheep_jax.errors import UserError
from isheep_jax.evaluation.saved import find_evaluation
from isheep_jax.evaluation.task import Response

SCORES = {"1": [{"prompt_strict": 1}], "2": [{"prompt_strict": 0, "instruction_strict": [1, 0]}]}


def test_a_directory_gives_back_what_was_written(tmp_path):
    evaluation = find_evaluation(write_evaluation(tmp_path, SCORES, responses={"2": "Well"}))
    assert list(evaluation.results) == ["ifeval"]
    answers = evaluation.answers("ifeval")
    assert answers["2", 0].response == Response("2", 0, ("Question 2?",), ("Well",), ("stop",))
    assert {key: answer.score.values for key, answer in answers.items()} == {
        ("1", 0): {"prompt_strict": 1.0},
        ("2", 0): {"prompt_strict": 0.0, "instruction_strict": [1, 0]},
    }


def test_a_run_means_its_newest_evaluated_iteration(tmp_path):
    for iteration in (2, 9, 10):
        write_evaluation(tmp_path / f"iteration_{iteration}", SCORES)
    (tmp_path / "iteration_11").mkdir()
    assert find_evaluation(tmp_path).name == str(tmp_path / "iteration_10")
    assert find_evaluation(tmp_path / "iteration_9").name == str(tmp_path / "iteration_9")


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_evaluation_is_refused(tmp_path, exists):
    path = tmp_path if exists else tmp_path / "other"
    with pytest.raises(UserError, match="isheep_jax.evaluate" if exists else "does not exist"):
        find_evaluation(path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"ifeval": 3}'])
def test_a_damaged_evaluation_is_named(tmp_path, text):
    write_evaluation(tmp_path, SCORES)
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*evaluation\.json"):
        find_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        ({"figures": None}, "has no good figures"),
        ({"settings": 5, "main": 1}, "has no good main, settings"),
        ({"figures": {"f1": {"value": 1}}}, "has a figure without value, stderr or count"),
        ({"settings": {"sampling": ["x"]}}, "sampling is no list of objects"),
    ],
)
def test_a_result_that_lacks_something_is_named(tmp_path, result, fault):
    write_evaluation(tmp_path, SCORES, **result)
    with pytest.raises(UserError, match=rf"cannot read .*evaluation\.json: ifeval .*{fault}.*; remove it"):
        find_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [('["Answer 1."]', "5"), ('["Answer 1."]', "[]"), ("[1, 0]", '["x"]'), ('{"n": 0}', "3")]
)
def test_a_response_of_another_shape_is_named(tmp_path, old, new):
    evaluation = find_evaluation(write_evaluation(tmp_path, SCORES))
    path = tmp_path / "evaluation/ifeval/samples.jsonl"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"cannot read .*samples\.jsonl, line [12]: it is damaged"):
        evaluation.answers("ifeval")


def test_a_sample_without_its_first_attempt_is_named(tmp_path):
    evaluation = find_evaluation(write_evaluation(tmp_path, SCORES))
    path = tmp_path / "evaluation/ifeval/samples.jsonl"
    path.write_text(path.read_text().replace('"attempt": 0', '"attempt": 1', 1))
    with pytest.raises(UserError, match=r"cannot read .*samples\.jsonl: sample 1 has no attempt 0"):
        evaluation.answers("ifeval")


@pytest.mark.parametrize("text", ["{}", "3", '{"sample": "1"', '{"sample": "1", "attempt": 0, "values": 3}'])
def test_a_damaged_line_is_named(tmp_path, text):
    evaluation = find_evaluation(write_evaluation(tmp_path, SCORES))
    (tmp_path / "evaluation/ifeval/samples.jsonl").write_text("\n" + text)
    with pytest.raises(UserError, match=r"cannot read .*samples\.jsonl, line 2: it is damaged") as caught:
        evaluation.answers("ifeval")
    assert "\n" not in str(caught.value)


def test_missing_samples_are_named(tmp_path):
    evaluation = find_evaluation(write_evaluation(tmp_path, SCORES))
    (tmp_path / "evaluation/ifeval/samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*samples\.jsonl"):
        evaluation.answers("ifeval")
