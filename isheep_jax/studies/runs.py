"""The runs of a study: where each lives, how it is made or taken up again, and what came of it."""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isheep_jax.config import Config, flatten
from isheep_jax.errors import NothingLeftError
from isheep_jax.files import read_json, write_json
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.inputs import environment, read_inputs
from isheep_jax.loop.protocols import Backend, Evaluator, Reporter
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.summary import mean_accuracy
from isheep_jax.studies.sharing import Run, share

# Settings that say where and how fast a run computes; the seed and the base have directories of their own.
_NOT_IN_NAME = ("workdir", "seed", "mesh.", "decode.slots", "decode.steps_per_call")
# Beside the run's own files: that the study is done with it.
_MARK = "study.json"


@dataclass(frozen=True)
class Workshop:
    """What makes runs: a backend for a config, its benchmarks and the instructions that they need held out."""

    backend: Callable[[Config], Backend]
    evaluators: Callable[[Config], dict[str, Evaluator]]
    held_out: Callable[[Config], frozenset[str]]
    reporter: Callable[[], Reporter]


@dataclass(frozen=True)
class Result:
    """What came of a run.

    evaluations, rows: evaluation.json and summary.json of iterations 0, 1, ... stopped: why it ended before its time,
    or "". seconds: of making it, in this call (None: it was there). shared: the stages that came from other runs.
    """

    evaluations: list[dict]
    rows: list[dict]
    stopped: str = ""
    seconds: float | None = None
    shared: tuple[str, ...] = ()


def place(config: Config, named: Config, base: str, seed: int) -> Config:
    """The config with the directory of its run: WORKDIR/BASE/CHANGES-DIGEST/SEED.

    Equal settings have one directory, whatever study they are in. named: the config by its name; what differs from it
    names the directory. base: the path of the base model.
    """
    config = replace(config, seed=seed, model=replace(config.model, path=base))
    before = flatten(named)
    settings = {name: value for name, value in flatten(config).items() if not name.startswith(_NOT_IN_NAME)}
    changes = [
        f"{name.rpartition('.')[2]}={value}"
        for name, value in settings.items()
        if value != before[name] and not name.startswith(("evaluate.", "model."))
    ]
    label = re.sub(r"[^\w.=,-]", "", ",".join(changes))[:60] or "unchanged"
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return replace(config, workdir=str(Path(config.workdir) / Path(base).name / f"{label}-{digest}" / str(seed)))


def result(config: Config) -> Result | None:
    """What came of a run that is there, whole; None when it is not."""
    directory = Path(config.directory)
    if not (directory / _MARK).exists():
        return None
    mark = read_json(directory / _MARK)
    iterations = [directory / f"iteration_{n}" for n in range(mark["evaluations"])]
    evaluations = [read_json(iteration / "evaluation.json") for iteration in iterations]
    rows = [read_json(iteration / "summary.json") for iteration in iterations]
    return Result(evaluations, rows, mark["stopped"])


def obtain(config: Config, workshop: Workshop) -> Result:
    """The run's result; makes the run, or goes on with it, unless it is there.

    What another run of the same seed and base beside it has finished is not computed again. A run that collapses
    (nothing is kept, say) is a result like others, with fewer iterations. Raises UserError for bad input.
    """
    directory = Path(config.directory)
    with _alone(directory):
        if found := result(config):
            return found
        begun = time.monotonic()
        backend = workshop.backend(config)
        inputs = read_inputs(config, backend.judge).digests
        RunDirectory.open(config, inputs, environment())
        shared = share(Run.read(directory), config, _beside(directory))
        stopped = ""
        try:
            run(config, backend, workshop.evaluators(config), workshop.held_out(config), workshop.reporter())
        except NothingLeftError as collapse:
            stopped = str(collapse)
        done = sum((directory / f"iteration_{n}" / "summary.json").exists() for n in range(config.iterations + 1))
        write_json(directory / _MARK, {"evaluations": done, "stopped": stopped})
        # Nothing trains from them any more, and they are most of what a run takes.
        for checkpoints in directory.glob("iteration_*/**/checkpoints"):
            shutil.rmtree(checkpoints)
        seconds = time.monotonic() - begun
        return replace(result(config), seconds=seconds, shared=tuple(shared))


def _beside(directory: Path) -> Iterator[Run]:
    """Other runs of the seed and the base."""
    for other in sorted(directory.parent.parent.glob(f"*/{directory.name}")):
        if other != directory and (other / "config.json").exists():
            # Runs of a version with other settings have nothing in common with this one.
            with contextlib.suppress(KeyError):
                yield Run.read(other)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits until no other process makes this run."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def figure_at(results: Mapping[str, Any], path: str) -> float | None:
    """A figure of an evaluation.json or summary.json by its path, such as "tiny.content".

    "": the mean accuracy over the benchmarks.
    """
    if not path:
        return mean_accuracy(results)
    value: Any = results
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None
