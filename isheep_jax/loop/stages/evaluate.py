"""Measures a model of the run on the tasks of `evaluate.tasks`."""

from collections.abc import Callable, Mapping

from etils import epath

from isheep_jax import distributed
from isheep_jax.files import check_seal, read_json_if_there, read_with_digest, sealed, write_json
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.models import DeferredModel
from isheep_jax.loop.protocols import Backend, Evaluator, OpenProgress, TaskResult, is_fuller
from isheep_jax.loop.stages.table import STAGES


def evaluate(
    context: StageContext, backend: Backend, evaluators: Mapping[str, Evaluator], *, model: str = "model"
) -> dict[str, TaskResult]:
    """Returns {task: result} of a model of the iteration (iteration 0: the base model).

    The results are kept in `evaluation.json` next to the model, and every sample in `evaluation/TASK/`.

    evaluators: by task.
    model: "model", or "engraved" for the model that verbose cloning learns from.
    """
    directory: epath.Path = context.directory.iteration(context.iteration)
    if model == "engraved":
        directory = directory / STAGES[model].directory
    title, suffix = STAGES["evaluation"].title, " (engraved)" if model == "engraved" else ""

    def progress_of(task: str) -> OpenProgress:
        def progress(what: str, total: int | None, unit: str):
            name = f"{title} {task}{suffix}" + (f", {what}" if what else "")
            return context.reporter.stage(context.iteration, name, total, unit)

        return progress

    measured = DeferredModel(backend, directory / context.directory.made if context.iteration else None)
    return measure(measured, evaluators, directory, progress_of)


def measure(
    model: DeferredModel,
    evaluators: Mapping[str, Evaluator],
    directory: epath.Path,
    progress_of: Callable[[str], OpenProgress],
) -> dict[str, TaskResult]:
    """Returns the results of a model by task; what was measured with the same settings is not measured again.

    A result of fewer samples than one that is there, with the same settings, is returned but not kept.

    Args:
        model: The model; it is loaded if it is asked something.
        evaluators: By task.
        directory: Gets `evaluation.json`, which may have results of other tasks, and `evaluation/TASK/`.
        progress_of: Opens progress bars of a task.
    """
    path = directory / "evaluation.json"
    known = read_results(path)
    results, measured = dict(known or {}), {}
    for task, evaluator in evaluators.items():
        place = directory / "evaluation" / task
        if task in results and evaluator.is_current(results[task]) and _has_samples(place):
            continue
        measured[task] = evaluator(model, place, progress_of(task), results.get(task))
        if not is_fuller(results.get(task), measured[task]):
            results[task] = sealed(measured[task])
            write_json(path, results)
    if known is None and not evaluators:
        write_json(path, results)
    return {task: measured.get(task) or results[task] for task in evaluators}


def read_results(path: epath.Path) -> dict[str, TaskResult] | None:
    """Returns the results in an `evaluation.json` by task; None if it is not there.

    All processes call this. Raises UserError when it is damaged.
    """
    results = read_json_if_there(path)
    remedy = "remove it and evaluate the model again: its responses are kept"
    if results is not None:
        for task, result in check_seal(results, str(path), remedy).items():
            check_seal(result, f"{path}, {task}", remedy)
    return results


def _has_samples(directory: epath.Path) -> bool:
    """Returns whether the samples of a task are there. Raises UserError when they are damaged."""
    path = directory / "samples.jsonl"

    def is_whole() -> bool:
        if not path.exists():
            return False
        read_with_digest(path, f"remove {directory} to evaluate the model again")
        return True

    return distributed.from_primary(is_whole)
