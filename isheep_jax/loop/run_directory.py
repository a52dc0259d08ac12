"""Where a run's artifacts live, how a stage commits and how a run resumes.

A file either is there, whole, or is not. A stage writes its records in numbered parts and is finished when its DONE
manifest is in place; there are no appends, so that the directory may be in a bucket. A run that was killed at any
instant resumes with the first part that is missing. Of several processes, process 0 writes and looks at what is there,
and tells the others.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from isheep_jax import directory_lock, distributed
from isheep_jax.config import BEFORE_THEY_CAME, Config, flatten, to_json
from isheep_jax.errors import UserError, quoted
from isheep_jax.files import (
    check_writable,
    file_digests,
    is_there,
    make_directory,
    on_object_store,
    read_json,
    utf8,
    write_atomically,
    write_json,
)
from isheep_jax.loop.stage_files import StageFiles
from isheep_jax.loop.stages.table import LEVELS, STAGES, StageSpec, inputs_after, later_sections

# Settings that say where, how fast and how far a run computes, not what: they may differ when it resumes.
_FREE = (
    *("name", "workdir", "iterations", "select.min_pairs", "guard.", "stop."),
    *("assess.judge_key", "assess.judge_requests"),
    *("evaluate.task_data", "evaluate.allow_code_execution", "evaluate.judge_key", "evaluate.judge_requests"),
    *("mesh.", "decode.slots", "decode.steps_per_call"),
)
# Models that a run begins with; "model.path/config.json" is the name of a file among its inputs.
MODEL_INPUTS = ("model.path", "assess.judge")
# Settings that change no result but in the last digits: they may differ as well, but are part of the digests.
_NOT_COMPARED = (*_FREE, "sft.remat")
# Directories for what no stage reads: compiled programs and profiles.
COMPILED, PROFILE = "compiled", "profile"
# What may lie in the directory of a new run: hidden files, what a fresh volume or a desktop brings along, the job's own
# log, compiled programs, and what a start that was interrupted left.
_HARMLESS = re.compile(
    rf"{COMPILED}|{PROFILE}|"
    r"\..*|lost\+found|System Volume Information|\$RECYCLE\.BIN|desktop\.ini|Thumbs\.db|__pycache__|"
    r".*\.(log|out|err|[oe]\d+)|(log|std(out|err))\.txt|(inputs|environment)\.json",
    re.IGNORECASE,
)


def digest(values: Any) -> str:
    """Returns the sha256 of the values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class RunDirectory:
    """The directory of a run. `RunDirectory.open` creates it, or takes it up again.

    path: where it is.
    config: the settings.
    names: those of the settings that the run's config.json has; None: all.
    warnings: lines for the user.
    """

    def __init__(
        self,
        path: epath.Path,
        config: Config,
        names: Collection[str] | None = None,
        warnings: Sequence[str] = (),
    ):
        self.path, self.warnings = path, warnings
        self._all_settings = flatten(config)
        self._settings = {n: v for n, v in self._all_settings.items() if names is None or n in names}

    @classmethod
    def open(
        cls,
        config: Config,
        inputs: Mapping[str, str],
        environment: Mapping[str, Any],
        models: Mapping[str, epath.Path] | None = None,
    ) -> "RunDirectory":
        """Creates the run directory, or resumes it.

        Args:
            config: The settings.
            inputs: Digests of the files that the run reads (seeds, prompt templates), by name.
            environment: Versions and devices, recorded once.
            models: The files of the models that it begins with, by name. They are inputs, too, whose digests are taken
                again only where size or time have changed.

        Raises UserError when the directory holds something else, cannot be written, or holds a run with other settings
        or inputs; the message names them.
        """
        path, models = config.directory, models or {}
        opening = distributed.from_primary(lambda: _check(path, config, inputs, environment, models))
        distributed.check_shared(path)
        distributed.from_primary(lambda: _write(path, config, environment, opening))
        return cls(path, config, opening["names"], opening["warnings"])

    def iteration(self, number: int) -> epath.Path:
        """Returns the directory of an iteration; 0 is the base model's."""
        return self.path / f"iteration_{number}"

    def model(self, number: int) -> epath.Path | None:
        """Returns what iteration `number` made, a model or an adapter; None for 0, the base model."""
        return self.iteration(number) / self.made if number else None

    @property
    def made(self) -> str:
        """The directory that a fine-tuning leaves for others to load: "model", or "adapter"."""
        return self._all_settings["sft.save"]

    def stage(self, iteration: int, spec: StageSpec, turn: int = 1) -> StageFiles:
        """Returns the files of a stage. The stages of a second turn have a directory of their own.

        Raises UserError when another process has taken the run directory from this one.
        """
        directory_lock.check(self.path)
        directory = self.iteration(iteration) / "second_turn" if turn == 2 else self.iteration(iteration)
        equal = {digest(settings_of(spec.level, self._all_settings))}
        return StageFiles(directory / spec.directory, spec.record, self.digest(spec.level), equal)

    def digest(self, level: str) -> str:
        """Returns the digest of the settings that the results of a level of an iteration depend on.

        Those that the run began without are not among them while they have the value that changes nothing.
        """
        return digest(settings_of(level, self._settings))


def settings_of(level: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the settings (by their command-line names) that the results of a level depend on.

    These are its own sections, those of earlier levels, and all that belong to no level, such as the model's.
    """
    unread = later_sections(level) | {"evaluate"}
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith(_FREE) and name.split(".")[0] not in unread
    }


def inputs_of(level: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Returns those of a run's inputs (see `RunDirectory.open`) that the results of a level depend on."""
    return {name: value for name, value in inputs.items() if not name.startswith(inputs_after(level))}


def stored_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the settings in a config.json by their command-line names."""
    settings = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            settings |= stored_settings(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = value
    return settings


def with_later_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's settings with those that came after its version, at the values that change nothing."""
    return {**flatten(Config()), **BEFORE_THEY_CAME, **settings}


def _check(
    path: epath.Path,
    config: Config,
    inputs: Mapping[str, str],
    environment: Mapping[str, Any],
    models: Mapping[str, epath.Path],
) -> dict[str, Any]:
    """Raises UserError unless `path` can become the run's directory, or is it already.

    Returns what is to be written: "names" of the settings, "inputs" with those of the models, "stamps" of their files;
    and "warnings".
    """
    make_directory("workdir", path)
    resumes = is_there(path / "config.json")
    if not resumes:
        check_unused(path)
    recorded = _recorded_inputs(path) if resumes else {}
    stamps = {name: _stamp(file) for name, file in models.items()}
    inputs = {**inputs, **_model_digests(path, models, stamps, recorded)}
    names, warnings = list(flatten(config)), []
    if resumes:
        names = _check_settings(path, config)
        _check_inputs(path, recorded, inputs)
        warnings = _other_versions(path, environment)
    check_writable("workdir", path)
    return {"names": names, "inputs": inputs, "stamps": stamps, "warnings": warnings}


def _write(path: epath.Path, config: Config, environment: Mapping[str, Any], opening: Mapping[str, Any]) -> None:
    if not _is_environment(path / "environment.json"):
        write_json(path / "environment.json", environment)
    # Both may have changed in what no stage has used yet. The settings come last: they make it the directory of a run.
    if opening["stamps"]:
        _replace(path / "model_files.json", json.dumps(opening["stamps"], indent=2) + "\n")
    _replace(path / "inputs.json", json.dumps(opening["inputs"], indent=2, ensure_ascii=False) + "\n")
    _replace(path / "config.json", to_json(config, opening["names"]))


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file unless it has this text."""
    data = utf8(text)
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def check_unused(path: epath.Path) -> None:
    """Raises UserError where a directory without config.json holds anything that a new run would not."""
    others = sorted(p.name for p in path.iterdir() if not _HARMLESS.fullmatch(p.name))
    if any(name.startswith("iteration_") for name in others):
        raise UserError(
            f"workdir: {path} holds a run, but its config.json is missing; restore it, or name a new directory"
        )
    if others:
        raise UserError(
            f"workdir: {path} holds something else ({', '.join(others[:3])}{', ...' if others[3:] else ''}); "
            "name an empty or new directory"
        )


def _check_settings(path: epath.Path, config: Config) -> list[str]:
    """Returns the names of the settings that the run's config.json is to have.

    Raises UserError when it has others than `config` in what its stages have used.
    """
    tree = read_json(path / "config.json")
    if not isinstance(tree, dict) or not {f.name for f in dataclasses.fields(Config)} & set(tree):
        raise UserError(f"workdir: {path}/config.json is not that of a run; name an empty or new directory")
    stored, now = stored_settings(tree), flatten(config)
    before = with_later_settings(stored)
    unused = tuple(f"{section}." for section in sorted(later_sections(_begun(path / "iteration_1"))))
    differ = [
        f"{name} was {_show(before[name])}, now {_show(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before[name] != now.get(name) and not name.startswith(_NOT_COMPARED + unused)
    ]
    begun = stored.get("iterations")
    if isinstance(begun, int) and now["iterations"] < begun:
        differ.append(f"iterations was {begun}, now {now['iterations']} (it may only grow)")
    if differ:
        raise UserError(
            f"workdir: {path} holds a run with other settings (config.json there): {'; '.join(differ)}; "
            "name another directory"
        )
    return [name for name in now if name in stored or now[name] != before[name]]


def _recorded_inputs(path: epath.Path) -> dict[str, str]:
    if not is_there(path / "inputs.json"):
        raise UserError(f"{path}/inputs.json is missing; restore it, or name another directory")
    recorded = read_json(path / "inputs.json")
    if not isinstance(recorded, dict):
        raise UserError(f"{path}/inputs.json is damaged: it should be an object; restore it, or name another directory")
    return recorded


def _check_inputs(path: epath.Path, recorded: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    unread = inputs_after(_begun(path / "iteration_1"))
    # Earlier versions did not record the files of models.
    unrecorded = tuple(f"{kind}/" for kind in MODEL_INPUTS if not any(n.startswith(f"{kind}/") for n in recorded))
    changed = sorted(
        name
        for name in recorded.keys() | inputs.keys()
        if recorded.get(name) != inputs.get(name) and not name.startswith(unread + unrecorded)
    )
    if changed:
        raise UserError(
            f"workdir: {path} holds a run made with other files: {', '.join(changed[:5])}"
            f"{', ...' if changed[5:] else ''} changed since it began (its inputs.json says so); restore "
            "them, or name another directory"
        )


def check_base(run: epath.Path, files: Iterable[epath.Path]) -> None:
    """Raises UserError when the files of a run's base model are not those that it began with; all processes call this.

    They are read where size or time have changed. A run of a version that recorded no files passes.
    """
    distributed.from_primary(lambda: _check_base(run, {f"model.path/{file.name}": file for file in files}))


def _check_base(run: epath.Path, files: Mapping[str, epath.Path]) -> None:
    recorded = _recorded_inputs(run) if is_there(run / "config.json") else {}
    before = {name: value for name, value in recorded.items() if name.startswith("model.path/")}
    now = _model_digests(run, files, {name: _stamp(file) for name, file in files.items()}, before) if before else {}
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        place = next(iter(files.values())).parent
        raise UserError(
            f"{place} is not the base any more that {run} began with, to whose weights its adapters belong: "
            f"{', '.join(name.partition('/')[2] for name in changed[:5])}{', ...' if changed[5:] else ''} changed; "
            "restore it"
        )


def _stamp(file: epath.Path) -> list[int]:
    """Returns by what it is seen, without reading it, that a file may have changed."""
    if on_object_store(file):
        found = file.stat()
        return [found.length, found.mtime]
    found = Path(file).stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _model_digests(
    path: epath.Path,
    models: Mapping[str, epath.Path],
    stamps: Mapping[str, list[int]],
    recorded: Mapping[str, str],
) -> dict[str, str]:
    """Returns the sha256 of the files of models: as recorded where nothing says that a file has changed."""
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((path / "model_files.json").read_bytes())
    known = known if isinstance(known, dict) else {}
    digests = {n: recorded[n] for n in models if n in recorded and known.get(n) == stamps[n]}
    unknown = [name for name in models if name not in digests]
    try:
        return {**digests, **dict(zip(unknown, file_digests([models[n] for n in unknown]), strict=True))}
    except OSError as error:
        raise UserError(f"model.path: {error.filename or path} cannot be read: {error.strerror or error}") from error


def _is_environment(path: epath.Path) -> bool:
    """Returns whether a file is an environment.json that can be read."""
    try:
        environment = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(environment, dict) and isinstance(environment.get("packages", {}), dict)


def _other_versions(path: epath.Path, environment: Mapping[str, Any]) -> list[str]:
    """Returns a warning where a run goes on with other versions than it began with."""
    if not _is_environment(path / "environment.json"):
        return [f"{path}/environment.json is missing or damaged, and written anew"]
    before, now = (
        {"python": versions.get("python"), **versions.get("packages", {})}
        for versions in (read_json(path / "environment.json"), environment)
    )
    changed = [
        f"{name} {quoted(before[name], 40)} (now {now[name]})"
        for name in before
        if now.get(name, before[name]) != before[name]
    ]
    if not changed:
        return []
    return [f"the run began with {', '.join(changed)}: what it makes from here on may differ in the last digits"]


def _begun(iteration: epath.Path) -> str:
    """Returns the last level of an iteration that has left anything; the first where nothing has.

    A level that has not begun has used nothing of its settings yet, so those may still change: this is how a selection
    that kept nothing is mended without losing the stages before it.
    """
    traces = {level: [spec.directory for spec in STAGES.values() if spec.level == level] for level in LEVELS}
    traces["train"].append("checkpoints")
    begun = [level for level, names in traces.items() if any(is_there(iteration / name) for name in names)]
    return begun[-1] if begun else next(iter(LEVELS))


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
