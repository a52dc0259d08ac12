"""The table of evaluation tasks: a new task is a module like `tiny.py`, a row here and a name in `config.TaskName`."""

from collections.abc import Callable
from dataclasses import dataclass

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.evaluation import tiny, tiny_domain
from isheep_jax.loop.protocols import Evaluator


@dataclass(frozen=True)
class Task:
    """A held-out measurement of a model.

    evaluator: returns the evaluator for the settings `evaluate`. It takes the first `limit` prompts, or all where there
    are fewer; a section of the task's name, if any, has the settings that only this task has.
    held_out_texts: returns the texts that no run evaluated on the task may train on.
    figures: names of results that reports show next to the accuracy.
    """

    evaluator: Callable[[EvaluateConfig], Evaluator]
    held_out_texts: Callable[[], frozenset[str]]
    figures: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "tiny": Task(tiny.evaluator, tiny.held_out_texts, figures=("content",)),
    "tiny_domain": Task(tiny_domain.evaluator, tiny_domain.held_out_texts, figures=("content",)),
}


def evaluators(config: Config) -> dict[str, Evaluator]:
    """Returns the evaluator of each task in `evaluate.tasks`, in the order of `TASKS`.

    Raises `UserError` for settings that do not suit a task.
    """
    return {name: task.evaluator(config.evaluate) for name, task in TASKS.items() if name in config.evaluate.tasks}


def held_out_texts(config: Config) -> frozenset[str]:
    """Returns the texts that the loop must not train on because a task in `evaluate.tasks` measures with them."""
    return frozenset().union(*(TASKS[name].held_out_texts() for name in config.evaluate.tasks))
