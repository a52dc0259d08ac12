"""Runs the loop with the tasks of its config, for the command train and `isheep_jax.run`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.config_checks import check_values
from isheep_jax.directory_lock import owned
from isheep_jax.evaluation.task import JudgeModel
from isheep_jax.evaluation.tasks import check_stop, evaluators, held_out_texts
from isheep_jax.loop import algorithm
from isheep_jax.loop.protocols import Backend, Evaluator, Reporter
from isheep_jax.loop.selection.rules import check_readings
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.runtime.backend import JaxBackend

_logger = logging.getLogger(__name__)


def run(config: Config, reporter: Reporter | None = None, backend: Backend | None = None) -> list[IterationSummary]:
    """Runs all iterations of a config, or resumes the run in `config.directory`.

    Args:
        config: The settings, such as those of `named_config`.
        reporter: Is told of stages, iterations and warnings; None: the logger "isheep_jax.runtime.run".
        backend: Gives models and makes new ones; None: `JaxBackend(config)`.

    Returns the summaries of the base model (iteration 0) and of each iteration. Raises `UserError` for bad input.
    """
    check_values(config)
    check_readings(config)
    with owned("workdir", config.directory):
        backend = backend or JaxBackend(config)
        check_stop(config)
        measures = evaluators_of(config.evaluate, backend)
        return algorithm.run(config, backend, measures, held_out_texts(config.evaluate), reporter or LogReporter())


def evaluators_of(settings: EvaluateConfig, backend: Backend) -> dict[str, Evaluator]:
    """Returns the evaluators of a run's tasks, by task."""
    directory = backend.evaluation_judge
    judge = directory and JudgeModel(lambda: backend.load(directory), backend.weights_digest(directory))
    return evaluators(settings, backend.decoding, judge)


class LogReporter:
    """The `Reporter` of the loop that logs: silent unless the program configures `logging`."""

    @contextmanager
    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> Iterator["_Stage"]:
        """Logs the start and the end of a stage."""
        _logger.info("iteration %d, %s: %s %s", iteration, name, "" if total is None else total, unit)
        stage = _Stage()
        yield stage
        _logger.info("iteration %d, %s: finished %d %s", iteration, name, stage.done, unit)

    def row(self, summary: IterationSummary) -> None:
        """Logs the summary of an iteration."""
        _logger.info("%s", summary)

    def note(self, text: str) -> None:
        """Logs a line of information."""
        _logger.info("%s", text)

    def warn(self, text: str) -> None:
        """Logs a warning."""
        _logger.warning("%s", text)


class _Stage:
    def __init__(self):
        self.done = 0

    def advance(self, n: int = 1, **notes: object) -> None:
        self.done += n

    def update(self, done: int, total: int, **notes: object) -> None:
        self.done = done
