"""The evaluator measures a model through the loop's protocol."""

import pytest
from scripted_backend import CountingStage

from isheep_jax.config import EvaluateConfig, TinyTaskConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.evaluation import tiny, tiny_domain
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


def measured(answer) -> dict:
    seen = CountingStage()
    evaluator = tiny.evaluator(EvaluateConfig(tiny=TinyTaskConfig(split="selection"), limit=200))
    result = evaluator(Scripted(answer), seen)
    assert seen.updates[-1] == (200, 200)
    return result


def test_perfect_model_has_accuracy_one():
    result = measured(lambda item: item.response)
    assert (result["accuracy"], result["content"], result["stderr"], result["count"]) == (1.0, 1.0, 0.0, 200)
    assert set(result["tasks"].values()) == {1.0}
    assert set(result["constraints"]) == set(world.CONSTRAINTS)


def test_model_that_ignores_format_is_right_in_content_alone():
    result = measured(lambda item: item.answer)
    assert result["content"] == 1.0
    # Only instructions without constraints, or with capital letters for a number, are wholly right.
    assert 0.1 < result["accuracy"] < 0.25
    assert result["constraint_counts"]["0"] == 1.0
    assert result["constraint_counts"]["3"] == 0.0
    assert result["stderr"] == pytest.approx((result["accuracy"] * (1 - result["accuracy"]) / 200) ** 0.5)


def test_examples_are_same_prompts_for_every_model():
    right, wrong = measured(lambda item: item.response), measured(lambda item: "no")
    assert [e["instruction"] for e in right["examples"]] == [e["instruction"] for e in wrong["examples"]]
    assert [e["correct"] for e in right["examples"]] == [True] * 3
    assert [e["correct"] for e in wrong["examples"]] == [False] * 3


@pytest.mark.parametrize("task", [tiny, tiny_domain])
def test_limit_beyond_prompts_of_split_takes_all_of_them(task):
    assert task.split_items("development", 1001) == task.split_items("development", 1000)
    assert len(task.split_items("development", 1001)) == 1000


def test_held_out_texts_hold_every_wording():
    held_out = tiny.held_out_texts()
    for item in tiny.split_items("test", 50):
        assert item.instruction in held_out
        assert set(item.wordings()) <= held_out
