"""The table of evaluation tasks: a new task is a module like `tiny.py` and a row here."""

from collections.abc import Callable, Mapping
from typing import Any

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError, did_you_mean
from isheep_jax.evaluation import (
    alpaca_eval,
    humaneval,
    ifeval,
    mbpp,
    mt_bench,
    squad,
    tiny,
    tiny_domain,
    triviaqa,
    xstest,
)
from isheep_jax.evaluation.harness import PREFIX, definitions, evaluator
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.evaluation.task import Task, TaskOptions
from isheep_jax.loop.protocols import Evaluator, Model

TASKS: dict[str, Task] = {
    "ifeval": ifeval.TASK,
    "humaneval": humaneval.HUMANEVAL,
    "humaneval_plus": humaneval.HUMANEVAL_PLUS,
    "mbpp": mbpp.MBPP,
    "mbpp_sanitized": mbpp.MBPP_SANITIZED,
    "mbpp_plus": mbpp.MBPP_PLUS,
    "squad": squad.SQUAD,
    "squad_v2": squad.SQUAD_V2,
    "triviaqa": triviaqa.TASK,
    "xstest": xstest.TASK,
    "alpaca_eval": alpaca_eval.TASK,
    "mt_bench": mt_bench.TASK,
    "tiny": tiny.TASK,
    "tiny_domain": tiny_domain.TASK,
}


def check_tasks(settings: EvaluateConfig) -> None:
    """Raises `UserError` for a task that does not exist, and for settings that do not suit a task."""
    for name in settings.tasks:
        if name.startswith(PREFIX):
            definitions.check_name(name)
        elif name in TASKS:
            TASKS[name].check(settings)
        else:
            raise UserError(
                f"--evaluate.tasks: there is no task '{name}'; {did_you_mean(name, TASKS)}known: {', '.join(TASKS)}"
            )


def evaluators(
    settings: EvaluateConfig, decoding: Mapping[str, Any], judge: Callable[[], Model] | None = None
) -> dict[str, Evaluator]:
    """Returns the evaluator of each of `settings.tasks`, in their order.

    Args:
        settings: Of the evaluation.
        decoding: What responses depend on besides weights and prompts, see `Backend.decoding`.
        judge: Loads the model that `settings.judge` names.

    Raises `UserError` as `check_tasks`.
    """
    check_tasks(settings)
    return {
        name: evaluator.HarnessEvaluator(name, settings, decoding)
        if name.startswith(PREFIX)
        else TaskEvaluator(name, TASKS[name], settings, decoding, judge)
        for name in settings.tasks
    }


def held_out_texts(settings: EvaluateConfig) -> frozenset[str]:
    """Returns the texts that the loop must not train on because one of `settings.tasks` measures with them."""
    return frozenset().union(*(_held_out(name, settings) for name in settings.tasks))


def _held_out(name: str, settings: EvaluateConfig) -> frozenset[str]:
    if name.startswith(PREFIX):
        return evaluator.held_out_texts(name, settings)
    task = TASKS[name]
    if task.held_out_texts:
        return task.held_out_texts()
    return frozenset(text for sample in task.samples(TaskOptions(settings)) for text in sample.held_out)
