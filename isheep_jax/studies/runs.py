"""The runs of a study: the directory of each, running or resuming it, and reading its results."""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from isheep_jax.config import Config, EvaluateConfig, flatten
from isheep_jax.directory_lock import owned
from isheep_jax.errors import NothingLeftError, UserError
from isheep_jax.files import check_seal, file_digests, read_json, sealed, write_json
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.inputs import environment, read_inputs
from isheep_jax.loop.protocols import Backend, Evaluator, Reporter
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.stages.evaluate import read_results
from isheep_jax.loop.summary import mean_accuracy
from isheep_jax.studies.sharing import Run, share

# Settings that change no result (where and how fast a run computes), and the seed, which names a directory itself.
_NOT_IN_NAME = ("workdir", "seed", "mesh.", "decode.slots", "decode.steps_per_call")
# Written next to the run's own files when the study is done with the run.
_MANIFEST = "study.json"


@dataclass(frozen=True)
class RunFactory:
    """Makes what a run needs besides its config: the backend, evaluators, held-out instructions and reporter."""

    backend: Callable[[Config], Backend]
    evaluators: Callable[[EvaluateConfig, Backend], dict[str, Evaluator]]
    held_out: Callable[[EvaluateConfig], frozenset[str]]
    reporter: Callable[[], Reporter]


@dataclass(frozen=True)
class Result:
    """The results of a run.

    evaluations, rows: evaluation.json and summary.json of iterations 0, 1, ... stopped: why the run ended early, or "".
    seconds: what running it took in this call; None if it was finished before. shared: stages linked from other runs.
    """

    evaluations: list[dict]
    rows: list[dict]
    stopped: str = ""
    seconds: float | None = None
    shared: tuple[str, ...] = ()


def with_run_directory(config: Config, named: Config, base: str, seed: int) -> Config:
    """Returns the config of one run, with its directory WORKDIR/BASE/CHANGES-DIGEST/SEED.

    Equal settings share one directory, whatever study they belong to.

    Args:
        config: The settings of the row; `workdir` is the directory of all runs.
        named: The named config that the study starts from. The settings that differ from it name the directory.
        base: Path of the base model.
        seed: Seed of the run.
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


def read_result(config: Config) -> Result | None:
    """Reads the results of a run; None unless the run is finished. Raises `UserError` where they are damaged."""
    path = config.directory / _MANIFEST
    if not path.exists():
        return None
    remedy = f"remove {path} and the study writes it again"
    manifest = check_seal(read_json(path), str(path), remedy)
    count, stopped = manifest.get("evaluations"), manifest.get("stopped")
    if not isinstance(count, int) or not isinstance(stopped, str):
        raise UserError(f"{path} is damaged: it needs evaluations and stopped; {remedy}")
    iterations = [config.directory / f"iteration_{n}" for n in range(count)]
    evaluations = [read_results(iteration / "evaluation.json") or {} for iteration in iterations]
    rows = [read_json(iteration / "summary.json") for iteration in iterations]
    if "summaries" in manifest and manifest["summaries"] != _digests_of(iterations):
        raise UserError(f"{config.directory}: a summary.json is damaged: it has changed since it was written; {remedy}")
    return Result(evaluations, rows, stopped)


def _digests_of(iterations: Sequence[epath.Path]) -> list[str]:
    """Returns the sha256 of the summary of each iteration."""
    return file_digests([iteration / "summary.json" for iteration in iterations])


def run_or_resume(config: Config, factory: RunFactory) -> Result:
    """Returns the results of a run, after running or resuming it if it is not finished.

    Stages that another run of the same seed and base model has finished are not computed again. A run that collapses
    (for example because nothing is kept) has results like any other, with fewer iterations. Raises `UserError` for bad
    input.
    """
    directory = Path(config.directory)
    # Several processes may share the work of a study, and the next one needs this run.
    with owned("workdir", directory, wait=True):
        if finished := read_result(config):
            return finished
        begun = time.monotonic()
        backend = factory.backend(config)
        inputs = read_inputs(config, backend.judge).digests
        RunDirectory.open(config, inputs, environment(), backend.files())
        shared = share(Run.read(directory), config, _sibling_runs(directory))
        stopped = ""
        try:
            measures = factory.evaluators(config.evaluate, backend)
            run(config, backend, measures, factory.held_out(config.evaluate), factory.reporter())
        except NothingLeftError as collapse:
            stopped = str(collapse)
        done = sum((directory / f"iteration_{n}" / "summary.json").exists() for n in range(config.iterations + 1))
        summaries = _digests_of([config.directory / f"iteration_{n}" for n in range(done)])
        write_json(directory / _MANIFEST, sealed({"evaluations": done, "stopped": stopped, "summaries": summaries}))
        # Training is over, and checkpoints take most of the space of a run.
        for checkpoints in directory.glob("iteration_*/**/checkpoints"):
            shutil.rmtree(checkpoints)
        seconds = time.monotonic() - begun
        return replace(read_result(config), seconds=seconds, shared=tuple(shared))


def _sibling_runs(directory: Path) -> Iterator[Run]:
    """Yields the other runs of the same seed and base model."""
    for other in sorted(directory.parent.parent.glob(f"*/{directory.name}")):
        if other != directory and (other / "config.json").exists():
            # A run of another version of the settings has nothing in common with this one.
            with contextlib.suppress(KeyError):
                yield Run.read(other)


def figure_at(results: Mapping[str, Any], path: str) -> float | None:
    """Returns a figure of an evaluation.json or summary.json by its path, such as "tiny.content".

    The path "" means the mean accuracy over the tasks.
    """
    if not path:
        return mean_accuracy(results)
    value: Any = results
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        figure = value.get("figures", {}).get(part, {})
        value = value.get(part, figure.get("value"))
    return value if isinstance(value, int | float) else None
