"""Finds what an evaluation left on disk and reads it back: `evaluation.json`, the responses and their scores."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.evaluation.task import Response, Score
from isheep_jax.files import read_json

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
    results: Mapping[str, Mapping[str, Any]]

    def answers(self, task: str) -> dict[Attempt, Answer]:
        """Reads every response of a task with its scores. Raises UserError where the file is missing or damaged."""
        path = self.directory / "evaluation" / task / "samples.jsonl"
        answers = (_answer(line, where) for line, where in _lines(path))
        return {(answer.response.sample, answer.response.attempt): answer for answer in answers}


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
    path = directory / "evaluation.json"
    results = read_json(path)
    if not isinstance(results, dict) or not all(isinstance(result, dict) for result in results.values()):
        raise UserError(f"cannot read {path}: it should have an object for each task; evaluate the model again")
    return Evaluation(str(directory), directory, results)


def _lines(path: epath.Path) -> Iterator[tuple[dict, str]]:
    """Yields each line's object, and the file and line for errors."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; evaluate the model again") from error
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
        values = {name: v if isinstance(v, list) else float(v) for name, v in line["values"].items()}
        response = Response(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        return Answer(response, Score(values, line["details"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(where) from error


def _damaged(where: str) -> UserError:
    return UserError(f"cannot read {where}: it is damaged; evaluate the model again")
