"""The table of tasks: what the settings name is there, and what a task returns is what its readers expect."""

import dataclasses
import json

import pytest
from scripted_backend import CountingStage

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.evaluation.tasks import TASKS, evaluators, held_out_texts


class Mute:
    """Answers nothing."""

    def generate(self, requests, sampling):
        for request in requests:
            yield Completion(request.id, "")


def evaluated_on(*tasks) -> Config:
    return Config(evaluate=EvaluateConfig(tasks=tasks, limit=20))


def test_sections_of_own_settings_belong_to_tasks():
    sections = {f.name for f in dataclasses.fields(EvaluateConfig) if f.default_factory is not dataclasses.MISSING}
    assert sections <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_results_hold_what_reports_and_console_read(name):
    progress = CountingStage()
    result = evaluators(evaluated_on(name))[name](Mute(), progress)
    assert progress.updates[-1] == (20, 20)
    assert json.loads(json.dumps(result)) == result
    assert (result["accuracy"], result["stderr"], result["count"]) == (0.0, 0.0, 20)
    for example in result.get("examples", []):
        assert {key: type(value) for key, value in example.items()} == {
            "instruction": str, "response": str, "correct": bool,
        }  # fmt: skip
    assert all(isinstance(result[figure], float) for figure in TASKS[name].figures)


@pytest.mark.parametrize("tasks", [(), *((name,) for name in TASKS), tuple(TASKS)])
def test_held_out_texts_are_those_of_all_chosen_tasks(tasks):
    assert held_out_texts(evaluated_on(*tasks)) == {text for name in tasks for text in TASKS[name].held_out_texts()}
