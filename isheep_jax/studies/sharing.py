"""Shares the work that two runs have in common: finished stages of one run are linked into the other.

Each step of a run has a key, a digest of everything that its result depends on: the settings it reads, in the form in
which they take effect in its iteration, the input files, the versions of the packages, and the keys of the steps before
it. In iteration 1, for example, every `sft.start` means the base model. Steps with equal keys have byte-identical
results, apart from their times.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isheep_jax.config import OWN_JUDGES, AssessConfig, Config
from isheep_jax.files import read_json, sealed, write_json
from isheep_jax.loop.judging.judges import judging_iteration, second_judge
from isheep_jax.loop.run_directory import digest, inputs_of, settings_of, stored_settings, with_later_settings
from isheep_jax.loop.selection.rules import needs_clusters
from isheep_jax.loop.stages.table import LEVELS, STAGES

Keys = dict[tuple[int, str], str]


@dataclass(frozen=True)
class Run:
    """A run directory with its settings and the keys of its steps."""

    directory: Path
    settings: Mapping[str, Any]
    keys: Keys

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """Reads a run that has begun."""
        settings = stored_settings(read_json(directory / "config.json"))
        inputs, environment = (read_json(directory / f"{name}.json") for name in ("inputs", "environment"))
        return cls(directory, settings, step_keys(with_later_settings(settings), inputs, environment))

    def iteration(self, number: int) -> Path:
        return self.directory / f"iteration_{number}"

    def made(self, manifest: Path) -> bool:
        """Returns whether a fine-tuning has finished, with the settings that this run has."""
        return manifest.exists() and read_json(manifest)["config"] == digest(settings_of("train", self.settings))

    def level(self, manifest: Path) -> str | None:
        """Returns the level of the key of a finished stage of this run; None if it has other settings."""
        name = manifest.parent.name
        level = next((spec.level for spec in STAGES.values() if spec.directory == name), None)
        if level is None or read_json(manifest)["config"] != digest(settings_of(level, self.settings)):
            return None
        if name == "agreement":
            return name
        # All stages of the second turn depend on the selection of the first.
        return "select" if manifest.parent.parent.name == "second_turn" else level


def step_keys(settings: Mapping[str, Any], inputs: Mapping[str, str], environment: Mapping[str, Any]) -> Keys:
    """Returns the keys by iteration and level: LEVELS, "agreement" (second judge), "evaluation" (from iteration 0)."""
    common = [environment, settings["name"], settings["evaluate.tasks"]]
    measured = {name: value for name, value in settings.items() if name.startswith("evaluate.")}
    read = settings_of(next(iter(LEVELS)), settings)
    base = {name: value for name, value in read.items() if name == "seed" or name.startswith(("model.", "decode."))}
    keys: Keys = {(0, "evaluation"): digest([common, base, measured])}
    before = ""
    for number in range(1, settings["iterations"] + 1):
        effective = _effective(settings, number)
        for level in LEVELS:
            read = settings_of(level, effective), inputs_of(level, inputs)
            before = digest([common, number, level, read, before])
            keys[number, level] = before
        second = second_judge(Config(assess=AssessConfig(judge=settings["assess.judge"])))
        compared = settings["assess.agreement"], _scorer(second, number)
        keys[number, "agreement"] = digest([keys[number, "assess"], compared])
        keys[number, "evaluation"] = digest([before, measured])
    return keys


def _effective(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the settings with one value for all values that mean the same in iteration `number`."""
    temperatures = settings["respond.temperature"]
    effective = {**settings, "respond.temperature": temperatures[min(number, len(temperatures)) - 1]}
    if number == 1:
        effective |= {"sft.start": "base", "sft.data": "iteration", "retrieval.pool": "seeds"}
    effective["assess.judge"] = _scorer(settings["assess.judge"], number)
    # A second judge changes only the agreement.
    del effective["assess.agreement"]
    return effective


def _scorer(judge: str, number: int) -> int | str:
    """Returns the iteration whose model scores in iteration `number` (0: the base model), or another judge itself."""
    return judging_iteration(judge, number) if judge in OWN_JUDGES else judge


def share(run: Run, config: Config, others: Iterable[Run]) -> list[str]:
    """Links into `run` what other runs have finished and it has not. Returns the names of what was linked."""
    shared = []
    for other in others:
        for number in range(config.iterations + 1):
            same = {level for (n, level), key in run.keys.items() if n == number and other.keys.get((n, level)) == key}
            if same and other.iteration(number).is_dir():
                shared += [f"{number}/{name}" for name in _share_iteration(run, other, number, same, config)]
    return shared


def _share_iteration(run: Run, other: Run, number: int, same: set[str], config: Config) -> Iterator[str]:
    target_directory, source = run.iteration(number), other.iteration(number)
    unused = {"vectors": not needs_clusters(config)}
    for manifest in sorted((*source.glob("*/DONE"), *source.glob("second_turn/*/DONE"))):
        level, stage = other.level(manifest), manifest.parent
        target = target_directory / stage.relative_to(source)
        if level not in same or unused.get(stage.name) or (target / "DONE").exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        _link(stage, target, leave_out=("DONE",))
        _rewrite(manifest, target / "DONE", run, other)
        yield str(target.relative_to(target_directory))
    for name in ("engraved", "model"):
        # The engraved model of cloning has a directory of its own.
        within = "engraved" if name == "engraved" else ""
        yield from _share_model(run, other, target_directory / within, source / within, name, same)


def _share_model(run: Run, other: Run, target: Path, source: Path, name: str, same: set[str]) -> Iterator[str]:
    trained, measured = source / "fine_tune.json", source / "evaluation.json"
    if "train" in same and other.made(trained) and not (target / "fine_tune.json").exists():
        for part in ("model", "adapter"):
            shutil.rmtree(target / part, ignore_errors=True)
            if (source / part).exists():
                _link(source / part, target / part)
        _rewrite(trained, target / "fine_tune.json", run, other)
        yield name
    if "evaluation" in same and measured.exists() and not (target / "evaluation.json").exists():
        shutil.rmtree(target / "evaluation", ignore_errors=True)
        if (source / "evaluation").exists():
            _link(source / "evaluation", target / "evaluation")
        _link(measured, target / "evaluation.json")
        yield "evaluation"


def _rewrite(manifest: Path, target: Path, run: Run, other: Run) -> None:
    """Writes a manifest of the other run as this run would have written it, with the other's duration."""
    digests = {digest(settings_of(level, other.settings)): digest(settings_of(level, run.settings)) for level in LEVELS}
    content = read_json(manifest)
    write_json(target, sealed({**content, "config": digests[content["config"]]}))


def _link(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Hard-links a file, or all files of a directory. Runs replace files and never write into them."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.name not in leave_out:
                _link(path, target / path.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # The file system has no hard links.
        shutil.copy2(source, target)
