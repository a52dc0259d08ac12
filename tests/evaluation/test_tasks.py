"""The table of tasks: what the settings name is there, and what a task returns is what its readers expect."""

import dataclasses
import json

import pytest
from etils import epath
from scripted_backend import Counting

from isheep_jax.config import Config, EvaluateConfig, StopConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.evaluation.tasks import TASKS, check_stop, check_tasks, evaluators, held_out_texts

EMBEDDED = ("tiny", "tiny_domain")  # the tasks that need no files


class Mute:
    """Answers nothing."""

    def generate(self, requests, sampling):
        for request in requests:
            yield Completion(request.id, "")


def test_sections_of_own_settings_belong_to_tasks():
    sections = {f.name for f in dataclasses.fields(EvaluateConfig) if f.default_factory is not dataclasses.MISSING}
    assert sections <= set(TASKS)


def test_unknown_task_is_refused_with_nearest_name():
    with pytest.raises(UserError, match="there is no task 'tiny_domian'; did you mean 'tiny_domain'"):
        check_tasks(EvaluateConfig(tasks=("tiny", "tiny_domian")))


@pytest.mark.parametrize(
    ("tasks", "judge", "good"),
    [(("alpaca_eval",), "", False), (("alpaca_eval",), "x", True), (("mt_bench",), "x", False), (("tiny",), "", True)],
)
def test_a_run_stops_by_accuracy_only_where_a_task_measures_one(tasks, judge, good):
    config = Config(stop=StopConfig("accuracy"), evaluate=EvaluateConfig(tasks=tasks, judge=judge))
    if good:
        check_stop(config)
        return
    with pytest.raises(UserError, match=f"--stop.measure: accuracy is not measured by {tasks[0]}"):
        check_stop(config)


@pytest.mark.parametrize("name", EMBEDDED)
def test_results_hold_what_reports_and_console_read(name, tmp_path):
    progress = Counting()
    evaluator = evaluators(EvaluateConfig(tasks=(name,), limit=20), {"chat_template": "tiny", "weights": "w"})[name]
    result = evaluator(Mute(), epath.Path(tmp_path), progress)
    assert progress.opened == [["", 20, "responses", 20]]
    assert json.loads(json.dumps(result)) == result
    assert (result["accuracy"], result["stderr"], result["count"], result["of"]) == (0.0, 0.0, 20, 1000)
    for example in result["examples"]:
        assert {key: type(value) for key, value in example.items()} == {
            "instruction": str, "response": str, "correct": bool,
        }  # fmt: skip
    assert {TASKS[name].main, *TASKS[name].shown} <= set(result["figures"])


@pytest.mark.parametrize("tasks", [(), *((name,) for name in EMBEDDED), EMBEDDED])
def test_held_out_texts_are_those_of_all_chosen_tasks(tasks):
    held_out = held_out_texts(EvaluateConfig(tasks=tasks))
    assert held_out == {text for name in tasks for text in TASKS[name].held_out_texts()}
