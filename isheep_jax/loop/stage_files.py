"""The files of one stage: numbered parts of records, and a DONE manifest when all of them are in place.

Every part is known by its sha256, in DONE or, until that is there, in parts.json, which names a part before it is
written. A damaged part of an unfinished stage is made again; one of a finished stage, on which others depend, is
refused.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError
from isheep_jax.files import (
    check_seal,
    file_digests,
    is_there,
    read_json_if_there,
    remove_remainders,
    sealed,
    sha256,
    utf8,
    write_atomically,
    write_json,
)
from isheep_jax.loop.records import from_line, to_line

T = TypeVar("T")

# Digests of the parts of an unfinished stage.
_PARTS = "parts.json"
# What must be in DONE.
_MANIFEST = {"counts": dict, "parts": dict, "config": str}


class StageFiles(Generic[T]):
    """A directory of `part-00000.jsonl`, `part-00001.jsonl`, ... and DONE.

    A part is there whole or not at all, and nothing is appended, so that the directory may be in a bucket.

    directory: where they are.
    record: type of the records.
    config_digest: digest of the settings that they depend on.
    equal_digests: digests of the same settings, as other versions make them.
    damaged: after `parts`, the name of a part that was damaged and is to be made again; "" for none.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        record: type[T],
        config_digest: str,
        equal_digests: Collection[str] = (),
    ):
        self.directory = epath.Path(directory)
        self.damaged = ""
        self._record = record
        self._digest = config_digest
        self._equal_digests = {config_digest, *equal_digests}
        self._begun = time.monotonic()
        self._digests: dict[str, str] | None = None  # of the parts; None: not read yet

    def done(self) -> dict | None:
        """Returns the DONE manifest (counts, sha256 of each part, config digest, seconds); None while unfinished.

        Raises UserError when it is damaged, or the stage was made with other settings than the run has now.
        """
        path = self.directory / "DONE"
        manifest = read_json_if_there(path)
        if manifest is None:
            return None
        remedy = f"restore it, or remove {self.directory} to make this stage again, and what came after it"
        check_seal(manifest, str(path), remedy)
        if wrong := [name for name, kind in _MANIFEST.items() if not isinstance(manifest.get(name), kind)]:
            raise UserError(f"{path} is damaged: it has no good {', '.join(wrong)}; {remedy}")
        if manifest["config"] not in self._equal_digests:
            raise UserError(
                f"{self.directory} was made with other settings than {self.directory.parent.parent}/config.json says"
            )
        return manifest

    def parts(self) -> list[list[T]]:
        """Returns the records of the parts that are in place, in order; removes remainders of interrupted writes.

        The parts of an unfinished stage from the first damaged one on are removed. Raises UserError when a part is not
        what DONE says, or is not made of these records.
        """
        manifest = self.done()
        texts, self.damaged = distributed.from_primary(lambda: self._texts(manifest))
        parts = []
        for index, text in enumerate(texts):
            texts[index] = ""  # as long as all of them, it would take as much memory as the records
            parts.append(self._parse(self._path(index), text))
        return parts

    def records(self) -> list[T]:
        """Returns the records of all parts that are in place."""
        return [r for part in self.parts() for r in part]

    def write_part(self, index: int, records: Sequence[T]) -> None:
        """Writes a part, whole or not at all."""
        if not distributed.is_primary():
            return
        path, data = self._path(index), utf8("".join(to_line(r) + "\n" for r in records))
        self._digests = {**self._known_digests(), path.name: sha256(data)}
        write_json(self.directory / _PARTS, self._digests)
        write_atomically(path, data)

    def finish(self, counts: dict[str, Any], beside: str = "", speed: Mapping[str, float] | None = None) -> None:
        """Writes DONE. Two runs differ in its seconds, counted since this process opened the stage, and in its speed.

        Args:
            counts: figures of the stage.
            beside: name of a directory that the stage has written besides its parts; "" for none.
            speed: figures of what the devices and their host did for it.
        """
        if not distributed.is_primary():
            return
        digests = self._known_digests()
        parts = {p.name: digests[p.name] for p in sorted(self.directory.glob("part-*.jsonl"))}
        seconds = round(time.monotonic() - self._begun, 3)
        manifest = {"counts": counts, "parts": parts, "config": self._digest, "seconds": seconds}
        if speed:
            manifest["speed"] = dict(speed)
        if beside:
            manifest["files"] = self._digests_beside(beside)
        write_json(self.directory / "DONE", sealed(manifest))
        (self.directory / _PARTS).unlink(missing_ok=True)

    def is_whole(self, beside: str) -> bool:
        """Returns whether a directory that the finished stage has written besides its parts is as DONE says.

        Where DONE says nothing, of a run of an earlier version, it is.
        """
        files = (self.done() or {}).get("files")
        return distributed.from_primary(lambda: files is None or files == self._digests_beside(beside))

    def _digests_beside(self, name: str) -> dict[str, str]:
        directory = self.directory / name
        paths = [path for path in sorted(directory.iterdir()) if path.is_file()] if directory.is_dir() else []
        return dict(zip((f"{name}/{path.name}" for path in paths), file_digests(paths), strict=True))

    def _texts(self, manifest: dict | None) -> tuple[list[str], str]:
        """Returns the texts of the parts, and the name of a damaged one that was removed with those after it, or ""."""
        remove_remainders(self.directory)
        if manifest:
            (self.directory / _PARTS).unlink(missing_ok=True)
            return self._finished_texts(manifest), ""
        texts, known, damaged = [], self._recorded(), ""
        self._digests = {}
        while not damaged and is_there(path := self._path(len(texts))):
            data = path.read_bytes()
            digest = sha256(data)
            # A run of an older version knows no digests before DONE.
            if known is None or known.get(path.name) == digest:
                self._digests[path.name] = digest
                texts.append(self._decoded(path, data))
            else:
                damaged = path.name
        for path in sorted(self.directory.glob("part-*.jsonl"))[len(texts) :]:
            path.unlink()
        return texts, damaged

    def _finished_texts(self, manifest: dict) -> list[str]:
        texts = []
        for index in range(len(manifest["parts"])):
            path = self._path(index)
            if not is_there(path):
                raise UserError(f"{path} is missing; restore it, or start a new run directory")
            data = path.read_bytes()
            if manifest["parts"].get(path.name) != sha256(data):
                raise UserError(f"{path} has changed since the run wrote it; restore it, or start a new run directory")
            texts.append(self._decoded(path, data))
        return texts

    def _known_digests(self) -> dict[str, str]:
        """Returns the digests of the parts of an unfinished stage that are in place."""
        if self._digests is None:
            self._digests = self._recorded() or {}
        return self._digests

    def _recorded(self) -> dict[str, str] | None:
        """Returns what parts.json says; nothing where it is damaged, None where it is not there."""
        try:
            digests = json.loads((self.directory / _PARTS).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return digests if isinstance(digests, dict) else {}

    def _decoded(self, path: epath.Path, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} does not hold records of this stage ({error!r})") from error

    def _parse(self, path: epath.Path, text: str) -> list[T]:
        try:
            return [from_line(self._record, line) for line in text.split("\n") if line]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not hold records of this stage ({error!r})") from error

    def _path(self, index: int) -> epath.Path:
        return self.directory / f"part-{index:05d}.jsonl"
