"""The table of evaluation tasks: a new task is a module like `tiny.py` and a row here."""

from collections.abc import Mapping
from typing import Any

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.errors import UserError, did_you_mean
from isheep_jax.evaluation import (
    alpaca_eval,
    humaneval,
    ifeval,
    mbpp,
    mt_bench,
    self_instruct,
    squad,
    tiny,
    tiny_domain,
    triviaqa,
    xstest,
)
from isheep_jax.evaluation.harness import PREFIX, definitions, evaluator
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.evaluation.task import JudgeModel, Task, TaskOptions
from isheep_jax.loop.protocols import Evaluator

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
    "self_instruct": self_instruct.TASK,
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


def check_stop(config: Config) -> None:
    """Raises `UserError` where the run stops by accuracy, but no task of it measures one."""
    tasks = config.evaluate.tasks
    if config.stop.measure == "accuracy" and not any(_gives_accuracy(name, config.evaluate) for name in tasks):
        raise UserError(f"--stop.measure: accuracy is not measured by {', '.join(tasks)}; add a task that measures one")


def _gives_accuracy(name: str, settings: EvaluateConfig) -> bool:
    if name.startswith(PREFIX):
        return True
    task = TASKS[name]
    return task.measures == "accuracy" and bool(settings.judge or "judge" not in task.scoring_settings)


def evaluators(
    settings: EvaluateConfig, decoding: Mapping[str, Any], judge: JudgeModel | None = None
) -> dict[str, Evaluator]:
    """Returns the evaluator of each of `settings.tasks`, in their order.

    Args:
        settings: Of the evaluation.
        decoding: What responses depend on besides weights and prompts, see `Backend.decoding`.
        judge: The model that `settings.judge` names.

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
