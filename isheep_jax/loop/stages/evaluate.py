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

    The results are kept in `evaluation.json` next to the model.

    evaluators: by task.
    model: "model", or "engraved" for the model that verbose cloning learns from.
    """
    directory: epath.Path = context.directory.iteration(context.iteration)
    if model == "engraved":
        directory = directory / STAGES[model].directory
    path = directory / "evaluation.json"
    if (results := read_json_if_there(path)) is not None:
        return results
    measured = DeferredModel(backend, directory / "model" if context.iteration else None)
    spec, suffix = STAGES["evaluation"], " (engraved)" if model == "engraved" else ""
    results = {}
    for task, evaluator in evaluators.items():
        with context.reporter.stage(context.iteration, f"{spec.title} {task}{suffix}", None, spec.unit) as progress:
            results[task] = evaluator(measured, progress)
    write_json(path, results)
    return results
