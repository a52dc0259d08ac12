"""The files of one stage: numbered parts of records, and a DONE manifest when all of them are in place."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError
from isheep_jax.files import read_json_if_there, remove_remainders, utf8, write_atomically, write_json
from isheep_jax.loop.records import from_line, to_line

T = TypeVar("T")


class StageFiles(Generic[T]):
    """A directory of `part-00000.jsonl`, `part-00001.jsonl`, ... and DONE.

    A part is there whole or not at all, and nothing is appended, so that the directory may be in a bucket.
    """

    def __init__(self, directory: epath.PathLike, record: type[T], config_digest: str):
        self.directory = epath.Path(directory)
        self._record = record
        self._digest = config_digest
        self._begun = time.monotonic()

    def done(self) -> dict | None:
        """Returns the DONE manifest (counts, sha256 of each part, config digest, seconds); None while unfinished.

        Raises UserError when the stage was made with other settings than the run has now.
        """
        manifest = read_json_if_there(self.directory / "DONE")
        if manifest and manifest["config"] != self._digest:
            raise UserError(
                f"{self.directory} was made with other settings than {self.directory.parent.parent}/config.json says"
            )
        return manifest

    def parts(self) -> list[list[T]]:
        """Returns the records of the parts that are in place, in order; removes remainders of interrupted writes.

        Raises UserError when a part is not what DONE says, or is not made of these records.
        """
        manifest = self.done()
        return [
            self._parse(self._path(index), text)
            for index, text in enumerate(distributed.from_primary(lambda: self._texts(manifest)))
        ]

    def records(self) -> list[T]:
        """Returns the records of all parts that are in place."""
        return [r for part in self.parts() for r in part]

    def write_part(self, index: int, records: Sequence[T]) -> None:
        """Writes a part, whole or not at all."""
        lines = "".join(to_line(r) + "\n" for r in records)
        write_atomically(self._path(index), utf8(lines))

    def finish(self, counts: dict[str, Any]) -> None:
        """Writes DONE. Its seconds, counted since this process opened the stage, are all that two runs differ in."""
        if not distributed.is_primary():
            return
        parts = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(self.directory.glob("part-*.jsonl"))
        }
        seconds = round(time.monotonic() - self._begun, 3)
        write_json(
            self.directory / "DONE", {"counts": counts, "parts": parts, "config": self._digest, "seconds": seconds}
        )

    def _texts(self, manifest: dict | None) -> list[str]:
        remove_remainders(self.directory)
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

    def _path(self, index: int) -> epath.Path:
        return self.directory / f"part-{index:05d}.jsonl"
