"""Scores the responses to tasks with programs, as the runner does."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from etils import epath
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation import programs
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions


def skip_without_sandbox() -> None:
    """Skips a test where the system does not allow to run programs."""
    try:
        programs.check(EvaluateConfig(allow_code_execution=True))
    except UserError as error:
        if "ermi" in str(error) or "only on" in str(error):  # permitted, permission
            pytest.skip(str(error))
        raise


def options(task_data: Path, chat: bool = True, **settings) -> TaskOptions:
    return TaskOptions(EvaluateConfig(task_data=str(task_data), allow_code_execution=True, **settings), chat)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored(task: Task, options: TaskOptions, directory: Path, answer: Callable[[Sample], str]) -> dict[str, Score]:
    """Returns the score of each sample for a model that answers `answer(sample)`."""
    skip_without_sandbox()
    samples = task.samples(options)
    pairs = [(s, Response(s.id, 0, ("",), (answer(s),), ("stop",))) for s in samples]
    scores = task.score(pairs, Scoring(options.settings, epath.Path(directory), Counting()))
    return {sample.id: score for sample, score in zip(samples, scores)}


def reasons(scores: Mapping[str, Score]) -> dict[str, str]:
    """Returns why each sample that did not pass did not."""
    return {id: score.details["reason"] for id, score in scores.items() if not score.values["pass@1"]}
