"""Where a run's artifacts live, how a stage commits and how a run resumes.

A file either is there, whole, or is not. A stage writes its records in numbered parts and is finished when its DONE
manifest is in place; there are no appends, so that the directory may be in a bucket. A run that was killed at any
instant goes on with the first part that is missing. Of several processes, process 0 writes and looks at what is there,
and tells the others.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from etils import epath

from isheep_jax import distributed
from isheep_jax.config import Config, flatten, to_json
from isheep_jax.errors import UserError
from isheep_jax.files import on_object_store, read_json, read_json_if_there, write_atomically, write_json
from isheep_jax.loop.records import from_line, to_line

T = TypeVar("T")
Item = TypeVar("Item")

# The record stages in their order, with the section of the config that each one is the first to read.
STAGES = {"instructions": "synthesize", "responses": "respond", "scores": "assess", "selected": "select"}

# Stages that depend on what another depends on: those of the judge's view of what is there, of what instructions are
# about, and of the examples that prompts show.
_LIKE = {
    **{"agreement": "scores", "likelihoods": "scores", "vectors": "scores"},
    **{"topics": "instructions", "pool": "instructions", "examples": "responses"},
}

# Sections that are read after all of these.
_LAST = {"sft", "clone"}

# Records per part: what a kill can cost. Items per call of the model: several parts, so that the decode slots run empty
# only once in a while.
PART = 256
BLOCK = 8 * PART

# Settings that say where, how fast and how far a run computes, not what: they may differ when it resumes.
_FREE = (
    *("name", "workdir", "iterations", "select.min_pairs", "guard.", "stop."),
    *("assess.judge_key", "assess.judge_requests"),
    *("mesh.", "decode.slots", "decode.steps_per_call"),
)
# Inputs that are first read for the scores.
_ASSESS_INPUTS = ("assess.judge", "prompts/quality", "prompts/following", "prompts/joint", "prompts/few_shot")
# Inputs that are first read with a section other than the first.
_INPUTS = {"respond.": ("prompts/principles",), "assess.": _ASSESS_INPUTS, "clone.": ("prompts/thorough",)}
# Files that the commands put into a run directory before or beside the loop.
_BESIDE = {"log.txt", "metrics", "report.html"}


def digest(values: Any) -> str:
    """sha256 of the values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Stage(Generic[T]):
    """One stage of one iteration: a directory of `part-00000.jsonl`, ... and DONE."""

    def __init__(self, directory: epath.PathLike, record: type[T], config_digest: str):
        self.directory = epath.Path(directory)
        self._record = record
        self._digest = config_digest
        self._begun = time.monotonic()

    def done(self) -> dict | None:
        """The DONE manifest: counts, sha256 of each part, config digest, seconds. None while unfinished."""
        manifest = read_json_if_there(self.directory / "DONE")
        if manifest and manifest["config"] != self._digest:
            raise UserError(
                f"{self.directory} was made with other settings than {self.directory.parent.parent}/config.json says"
            )
        return manifest

    def parts(self) -> list[list[T]]:
        """Records of the parts that are in place, in order; remainders of a write that was cut short are removed.

        Raises UserError when a part is not what DONE says, or is not made of these records.
        """
        manifest = self.done()
        return [
            self._parse(self._path(index), text)
            for index, text in enumerate(distributed.from_primary(lambda: self._texts(manifest)))
        ]

    def _texts(self, manifest: dict | None) -> list[str]:
        """The parts that are in place, as texts."""
        for torn in self.directory.glob(".*.tmp"):
            torn.rmtree()
        texts = []
        while (path := self._path(len(texts))).exists():
            data = path.read_bytes()
            if manifest and manifest["parts"].get(path.name) != hashlib.sha256(data).hexdigest():
                raise UserError(f"{path} has changed since the run wrote it; restore it, or start a new run directory")
            try:
                texts.append(data.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{path} does not hold records of this stage ({error!r})") from error
        if manifest and len(texts) != len(manifest["parts"]):
            raise UserError(f"{path} is missing; restore it, or start a new run directory")
        return texts

    def _parse(self, path: epath.Path, text: str) -> list[T]:
        try:
            return [from_line(self._record, line) for line in text.split("\n") if line]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not hold records of this stage ({error!r})") from error

    def records(self) -> list[T]:
        return [r for part in self.parts() for r in part]

    def write_part(self, index: int, records: Sequence[T]) -> None:
        lines = "".join(to_line(r) + "\n" for r in records)
        write_atomically(self._path(index), lines.encode())

    def finish(self, counts: dict[str, Any]) -> None:
        """Puts DONE in place. Its seconds are those since this process took up the stage: all else is reproducible."""
        if not distributed.is_primary():
            return
        parts = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(self.directory.glob("part-*.jsonl"))
        }
        seconds = round(time.monotonic() - self._begun, 3)
        write_json(
            self.directory / "DONE", {"counts": counts, "parts": parts, "config": self._digest, "seconds": seconds}
        )

    def work(
        self,
        items: Sequence[Item],
        process: Callable[[Sequence[Item]], Iterator[tuple[int, T]]],
        advance: Callable[[int], None],
    ) -> list[T]:
        """One record per item, in the items' order, committed part by part; parts in place are not made again.

        process(block): yields (index within the block, record) in any order. advance(n): n more records are there.
        """
        records = self.records()
        if records:
            advance(len(records))
        while len(records) < len(items):
            block = items[len(records) : len(records) + BLOCK]
            made: dict[int, T] = {}
            committed = 0
            for index, record in process(block):
                made[index] = record
                advance(1)
                # Results come in any order; a part is written as soon as all of it and all before it are there.
                while committed < len(block) and all(
                    i in made for i in range(committed, min(committed + PART, len(block)))
                ):
                    part = [made[i] for i in range(committed, min(committed + PART, len(block)))]
                    self.write_part(len(records) // PART, part)
                    records.extend(part)
                    committed += len(part)
            if committed < len(block):
                raise RuntimeError(f"the model answered {len(made)} of {len(block)} requests")
        return records

    def _path(self, index: int) -> epath.Path:
        return self.directory / f"part-{index:05d}.jsonl"


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
        return self.path / f"iteration_{number}"

    def model(self, number: int) -> epath.Path | None:
        """The model that iteration `number` made; None for 0, the base model."""
        return self.iteration(number) / "model" if number else None

    def stage(self, iteration: int, name: str, record: type[T], turn: int = 1) -> Stage[T]:
        """turn: of a conversation; the stages of the second have a directory of their own."""
        place = self.iteration(iteration) / "second_turn" if turn == 2 else self.iteration(iteration)
        return Stage(place / name, record, self.digest(name))

    def digest(self, stage: str) -> str:
        """Digest of the settings that the results of a stage depend on: its own section and those of earlier stages.

        What is neither a stage of a section nor like one depends on all of them.
        """
        return digest(settings_of(stage, self._settings))


def settings_of(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings (by their command-line names) that `RunDirectory.digest` is of."""
    later = _later(stage) | {"evaluate"}
    return {
        name: value
        for name, value in settings.items()
        if not name.startswith(_FREE) and name.split(".")[0] not in later
    }


def inputs_of(stage: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Those of a run's inputs (see `RunDirectory.open`) that the results of a stage depend on."""
    unread = tuple(prefix for section in _later(stage) for prefix in _INPUTS.get(f"{section}.", ()))
    return {name: value for name, value in inputs.items() if not name.startswith(unread)}


def _later(stage: str) -> set[str]:
    """The sections of the config that are read after a stage."""
    names = list(STAGES)
    stage = _LIKE.get(stage, stage)
    return {STAGES[s] for s in names[names.index(stage) + 1 :]} | _LAST if stage in names else set()


def _check(path: epath.Path, config: Config, inputs: dict[str, str]) -> None:
    """Raises UserError unless `path` can become the run's directory, or is it already."""
    _check_writable(path)
    if (path / "config.json").exists():
        _check_resumable(path, config, inputs)
        return
    others = sorted(p.name for p in path.iterdir() if p.name not in _BESIDE | {"inputs.json", "environment.json"})
    if others:
        raise UserError(
            f"workdir: {path} holds something else ({', '.join(others[:3])}{', ...' if others[3:] else ''}); "
            "name an empty or new directory"
        )


def _check_writable(path: epath.Path) -> None:
    probe = path / ".probe.tmp"
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"workdir: {path} is a file; name a directory")
        path.mkdir(parents=True, exist_ok=True)
        for torn in path.glob(".*.tmp"):
            torn.unlink()
        probe.write_bytes(b"")
        probe.unlink()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"workdir: {path} needs a package that is not installed: {error}") from error
    except Exception as error:
        # Each kind of bucket has errors of its own.
        if not (isinstance(error, OSError) or on_object_store(path)):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"workdir: cannot write in {path}: {reason}; name another directory") from error


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
    # A stage that has not begun has used nothing of its section yet, so those settings may still change: this is how a
    # selection that kept nothing is mended without losing the stages before it.
    first = path / "iteration_1"
    unused = tuple(f"{section}." for stage, section in STAGES.items() if not (first / stage).exists())
    if not any((first / name).exists() for name in ("checkpoints", "model", "engraved")):
        unused += tuple(f"{section}." for section in _LAST)
    unused = tuple(u for u in unused if u != "synthesize.")
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
    unread = tuple(prefix for section in unused for prefix in _INPUTS.get(section, ()))
    changed = sorted(
        name
        for name in recorded.keys() | inputs.keys()
        if recorded.get(name) != inputs.get(name) and not name.startswith(unread)
    )
    if changed:
        raise UserError(
            f"workdir: {path} holds a run made with other files: {', '.join(changed)} changed since it began"
        )


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
