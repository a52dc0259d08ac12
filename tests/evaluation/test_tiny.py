"""The task on the tiny world scores responses letter for letter."""

import pytest
from etils import epath
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig, TinyTaskConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.evaluation import tiny
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.tiny import world


class Scripted:
    """Answers each instruction with `answer(item)`."""

    def __init__(self, answer):
        self.answer = answer

    def generate(self, requests, sampling):
        assert sampling.temperature == 0
        for request in reversed(requests):
            item = world.parse_instruction(request.prompt[-1].content)
            yield Completion(request.id, f" {self.answer(item)}")


@pytest.fixture
def measured(tmp_path):
    def measure(answer, name="a"):
        settings = EvaluateConfig(tiny=TinyTaskConfig(split="selection"), limit=200)
        evaluator = TaskEvaluator("tiny", tiny.TASK, settings, {"chat_template": "tiny", "weights": "w"})
        return evaluator(Scripted(answer), epath.Path(tmp_path / name), Counting())

    return measure


def value(result, figure) -> float:
    return result["figures"][figure]["value"]


def test_perfect_model_has_accuracy_one(measured):
    result = measured(lambda item: item.response)
    assert (result["accuracy"], value(result, "content"), result["stderr"], result["count"]) == (1.0, 1.0, 0.0, 200)
    assert {figure["value"] for figure in result["groups"]["task"].values()} == {1.0}
    assert {f"constraint_{name}" for name in world.CONSTRAINTS} <= set(result["figures"])


def test_model_that_ignores_format_is_right_in_content_alone(measured):
    result = measured(lambda item: item.answer)
    assert value(result, "content") == 1.0
    # Only instructions without constraints, or with capital letters for a number, are wholly right.
    assert 0.1 < result["accuracy"] < 0.25
    assert result["groups"]["constraints"]["0"]["value"] == 1.0
    assert result["groups"]["constraints"]["3"]["value"] == 0.0
    assert result["stderr"] == pytest.approx((result["accuracy"] * (1 - result["accuracy"]) / 199) ** 0.5)


def test_examples_are_same_prompts_for_every_model(measured):
    right, wrong = measured(lambda item: item.response), measured(lambda item: "no", "b")
    assert [e["instruction"] for e in right["examples"]] == [e["instruction"] for e in wrong["examples"]]
    assert [e["correct"] for e in right["examples"]] == [True] * 4
    assert [e["correct"] for e in wrong["examples"]] == [False] * 4


def test_held_out_texts_hold_every_wording():
    held_out = tiny.TASK.held_out_texts()
    for item in tiny.split_items("test")[:50]:
        assert item.instruction in held_out
        assert set(item.wordings()) <= held_out
