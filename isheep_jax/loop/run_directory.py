"""Where a run's artifacts live, how a stage commits and how a run resumes.

A file either is there, whole, or is not. A stage writes its records in numbered parts and is finished when its DONE
manifest is in place; there are no appends, so that the directory may be in a bucket. A run that was killed at any
instant resumes with the first part that is missing. Of several processes, process 0 writes and looks at what is there,
and tells the others.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from isheep_jax import directory_lock, distributed
from isheep_jax.config import Config, flatten, to_json
from isheep_jax.errors import UserError
from isheep_jax.files import check_writable, make_directory, read_json, write_atomically, write_json
from isheep_jax.loop.stage_files import StageFiles
from isheep_jax.loop.stages.table import LEVELS, STAGES, StageSpec, inputs_after, later_sections

# Settings that say where, how fast and how far a run computes, not what: they may differ when it resumes.
_FREE = (
    *("name", "workdir", "iterations", "select.min_pairs", "guard.", "stop."),
    *("assess.judge_key", "assess.judge_requests"),
    *("evaluate.task_data", "evaluate.allow_code_execution", "evaluate.judge_key", "evaluate.judge_requests"),
    *("mesh.", "decode.slots", "decode.steps_per_call"),
)
# What may lie in the directory of a new run: hidden files, what a fresh volume or a desktop brings along, the job's own
# log, and what a start that was interrupted left.
_HARMLESS = re.compile(
    r"\..*|lost\+found|System Volume Information|\$RECYCLE\.BIN|desktop\.ini|Thumbs\.db|__pycache__|"
    r".*\.(log|out|err|[oe]\d+)|(log|std(out|err))\.txt|(inputs|environment)\.json",
    re.IGNORECASE,
)


def digest(values: Any) -> str:
    """Returns the sha256 of the values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class RunDirectory:
    """The directory of a run. `RunDirectory.open` creates it, or takes it up again."""

    def __init__(self, path: epath.Path, config: Config):
        self.path = path
        self._settings = flatten(config)

    @classmethod
    def open(cls, config: Config, inputs: dict[str, str], environment: dict[str, Any]) -> "RunDirectory":
        """Creates the run directory, or resumes it.

        inputs: digests of the files that the run reads (seeds, prompt templates). environment: versions and devices,
        recorded once. Raises UserError when the directory holds something else, cannot be written, or holds a run with
        other settings or inputs; the message names them.
        """
        path = config.directory
        distributed.from_primary(lambda: _check(path, config, inputs))
        distributed.check_shared(path)
        distributed.from_primary(lambda: _write(path, config, inputs, environment))
        return cls(path, config)

    def iteration(self, number: int) -> epath.Path:
        """Returns the directory of an iteration; 0 is the base model's."""
        return self.path / f"iteration_{number}"

    def model(self, number: int) -> epath.Path | None:
        """Returns the model that iteration `number` made; None for 0, the base model."""
        return self.iteration(number) / "model" if number else None

    def stage(self, iteration: int, spec: StageSpec, turn: int = 1) -> StageFiles:
        """Returns the files of a stage. The stages of a second turn have a directory of their own.

        Raises UserError when another process has taken the run directory from this one.
        """
        directory_lock.check(self.path)
        directory = self.iteration(iteration) / "second_turn" if turn == 2 else self.iteration(iteration)
        return StageFiles(directory / spec.directory, spec.record, self.digest(spec.level))

    def digest(self, level: str) -> str:
        """Returns the digest of the settings that the results of a level of an iteration depend on."""
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


def _check(path: epath.Path, config: Config, inputs: dict[str, str]) -> None:
    """Raises UserError unless `path` can become the run's directory, or is it already."""
    make_directory("workdir", path)
    if (path / "config.json").exists():
        _check_resumable(path, config, inputs)
        check_writable("workdir", path)
        return
    others = sorted(p.name for p in path.iterdir() if not _HARMLESS.fullmatch(p.name))
    if others:
        raise UserError(
            f"workdir: {path} holds something else ({', '.join(others[:3])}{', ...' if others[3:] else ''}); "
            "name an empty or new directory"
        )
    check_writable("workdir", path)


def _write(path: epath.Path, config: Config, inputs: dict[str, str], environment: dict[str, Any]) -> None:
    known = path / "config.json"
    text = to_json(config).encode()
    if not known.exists():
        write_json(path / "inputs.json", inputs)
        write_json(path / "environment.json", environment)
        write_atomically(known, text)
        return
    # Both may have changed in what no stage has used yet.
    if read_json(path / "inputs.json") != inputs:
        write_json(path / "inputs.json", inputs)
    if known.read_bytes() != text:
        write_atomically(known, text)


def _check_resumable(path: epath.Path, config: Config, inputs: dict[str, str]) -> None:
    def settings(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from settings(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    tree = read_json(path / "config.json")
    if not isinstance(tree, dict) or not {f.name for f in dataclasses.fields(Config)} & set(tree):
        raise UserError(f"workdir: {path}/config.json is not that of a run; name an empty or new directory")
    before, now = dict(settings(tree)), flatten(config)
    begun = _begun(path / "iteration_1")
    unused = tuple(f"{section}." for section in sorted(later_sections(begun)))
    differ = [
        f"{name} was {_show(before.get(name))}, now {_show(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(_FREE + unused)
    ]
    if now["iterations"] < before.get("iterations", 0):
        differ.append(f"iterations was {before['iterations']}, now {now['iterations']} (it may only grow)")
    if differ:
        raise UserError(f"workdir: {path} holds a run with other settings: {'; '.join(differ)}; name another directory")
    recorded = read_json(path / "inputs.json")
    unread = inputs_after(begun)
    changed = sorted(
        name
        for name in recorded.keys() | inputs.keys()
        if recorded.get(name) != inputs.get(name) and not name.startswith(unread)
    )
    if changed:
        raise UserError(
            f"workdir: {path} holds a run made with other files: {', '.join(changed)} changed since it began"
        )


def _begun(iteration: epath.Path) -> str:
    """Returns the last level of an iteration that has left anything; the first where nothing has.

    A level that has not begun has used nothing of its settings yet, so those may still change: this is how a selection
    that kept nothing is mended without losing the stages before it.
    """
    traces = {level: [spec.directory for spec in STAGES.values() if spec.level == level] for level in LEVELS}
    traces["train"].append("checkpoints")
    begun = [level for level, names in traces.items() if any((iteration / name).exists() for name in names)]
    return begun[-1] if begun else next(iter(LEVELS))


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
