"""Finds what an evaluation left on disk and reads it back: `evaluation.json`, the responses and their scores."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.evaluation.task import Response, Score
from isheep_jax.files import check_seal, read_json, read_with_digest
from isheep_jax.loop.protocols import TaskResult

# What a `TaskResult` must have for its readers.
_KINDS = {
    "count": int,
    "of": int,
    "title": str,
    "version": int | float,
    "main": str,
    "figures": dict,
    "unfinished": int | float,
    "unanswered": int,
    "settings": dict,
    "scoring": dict,
}
# What mends damaged files: responses are kept apart from results.
_RESULTS_ANEW = "remove it and evaluate the model again: its responses are kept"
_ANEW = "remove it and evaluation.json, and evaluate the model again"

# An attempt at a sample: the sample's id and the number of the attempt.
Attempt = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """A response with its scores: a line of `samples.jsonl`."""

    response: Response
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """An evaluated model.

    name: the path that the user gave, with the iteration if that named a run.
    directory: has `evaluation.json` and `evaluation/TASK/samples.jsonl`.
    results: content of `evaluation.json`, by task.
    """

    name: str
    directory: epath.Path
    results: Mapping[str, TaskResult]

    def answers(self, task: str) -> dict[Attempt, Answer]:
        """Reads every response of a task with its scores. Raises UserError where the file is missing or damaged."""
        path = self.directory / "evaluation" / task / "samples.jsonl"
        read = (_answer(line, where) for line, where in _lines(path))
        answers = {(answer.response.sample, answer.response.attempt): answer for answer in read}
        for sample, _ in answers:
            if (sample, 0) not in answers:
                raise UserError(f"cannot read {path}: sample {sample} has no attempt 0; {_ANEW}")
        return answers


def find_evaluation(path: epath.PathLike) -> Evaluation:
    """Returns the evaluation in a directory, or that of a run's newest evaluated iteration.

    Raises UserError for a path without an evaluation or with a damaged one.
    """
    path = epath.Path(path)
    if (path / "evaluation.json").exists():
        return _evaluation(path)
    iterations = [child for child in path.glob("iteration_*") if child.name.removeprefix("iteration_").isdecimal()]
    evaluated = [child for child in iterations if (child / "evaluation.json").exists()]
    if evaluated:
        return _evaluation(max(evaluated, key=lambda child: int(child.name.removeprefix("iteration_"))))
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run, runs/NAME/iteration_N or an evaluation's directory")
    raise UserError(
        f"{path} has no evaluation.json, nor has an iteration in it; run python -m isheep_jax.evaluate on it first"
    )


def _evaluation(directory: epath.Path) -> Evaluation:
    return Evaluation(str(directory), directory, read_results(directory / "evaluation.json"))


def read_results(path: epath.Path) -> dict[str, TaskResult]:
    """Reads an `evaluation.json`. Raises UserError when it is damaged."""
    results = read_json(path)
    if not isinstance(results, dict):
        raise UserError(f"cannot read {path}: it should have an object for each task; {_RESULTS_ANEW}")
    for task, result in results.items():
        if fault := _fault(result):
            raise UserError(f"cannot read {path}: {task} {fault}; {_RESULTS_ANEW}")
        check_seal(result, f"{path}, {task}", _RESULTS_ANEW)
    return results


def _fault(result: Any) -> str:
    """Returns what is wrong with a task's result; "" for a good one."""
    if not isinstance(result, dict):
        return "should be an object"
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(result.get(name), kind)]:
        return f"has no good {', '.join(wrong)}"
    if not all(_is_figure(figure) for figure in result["figures"].values()):
        return "has a figure without value, stderr or count"
    sampling = result["settings"].get("sampling", [])
    if not isinstance(sampling, list) or not all(isinstance(parameters, dict) for parameters in sampling):
        return "has settings whose sampling is no list of objects"
    return ""


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), int | float) for name in ("value", "stderr", "count")
    )


def _lines(path: epath.Path) -> Iterator[tuple[dict, str]]:
    """Yields each line's object, and the file and line for errors."""
    try:
        lines = read_with_digest(path, _ANEW).decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: {error}; {_ANEW}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _damaged(where) from error
        if not isinstance(value, dict):
            raise _damaged(where)
        yield value, where


def _answer(line: dict, where: str) -> Answer:
    fields = {field.name: line[field.name] for field in dataclasses.fields(Response) if field.name in line}
    try:
        values = {name: [*map(float, v)] if isinstance(v, list) else float(v) for name, v in line["values"].items()}
        response = Response(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        details = line["details"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where) from error
    turns = (response.prompts, response.texts, response.finish_reasons)
    is_response = isinstance(response.sample, str) and isinstance(response.attempt, int) and all(map(_are_texts, turns))
    if not is_response or not isinstance(details, dict):
        raise _damaged(where)
    return Answer(response, Score(values, details))


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _damaged(where: str) -> UserError:
    return UserError(f"cannot read {where}: it is damaged; {_ANEW}")
