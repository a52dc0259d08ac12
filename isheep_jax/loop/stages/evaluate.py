"""Measures a model of the run on the tasks of `evaluate.tasks`."""

from collections.abc import Mapping

from etils import epath

from isheep_jax.files import read_json_if_there, write_json
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.models import DeferredModel
from isheep_jax.loop.protocols import Backend, Evaluator
from isheep_jax.loop.stages.table import STAGES


def evaluate(
    context: StageContext, backend: Backend, evaluators: Mapping[str, Evaluator], *, model: str = "model"
) -> dict[str, dict]:
    """Returns {task: result} of a model of the iteration (iteration 0: the base model).

    The results are kept in `evaluation.json` next to the model, and every sample in `evaluation/TASK/`.

    evaluators: by task.
    model: "model", or "engraved" for the model that verbose cloning learns from.
    """
    directory: epath.Path = context.directory.iteration(context.iteration)
    if model == "engraved":
        directory = directory / STAGES[model].directory
    path = directory / "evaluation.json"
    known = read_json_if_there(path)
    results = known or {}
    measured = DeferredModel(backend, directory / "model" if context.iteration else None)
    title, suffix = STAGES["evaluation"].title, " (engraved)" if model == "engraved" else ""
    for task, evaluator in evaluators.items():
        if task in results:
            continue

        def progress(what: str, total: int | None, unit: str, task: str = task):
            name = f"{title} {task}{suffix}" + (f", {what}" if what else "")
            return context.reporter.stage(context.iteration, name, total, unit)

        results[task] = evaluator(measured, directory / "evaluation" / task, progress)
        write_json(path, results)
    if known is None and not evaluators:
        write_json(path, results)
    # The command evaluate may have added tasks of its own.
    return {task: results[task] for task in evaluators}
