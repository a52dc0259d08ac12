"""Completions of a file of prompts, on the disk as they come, so that a command that was stopped or killed goes on.

OUTPUT.partial/settings.json   what the completions depend on besides their prompts
OUTPUT.partial/part-*.jsonl    completions; the first line is the sha256 of the others
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from etils import epath

from isheep_jax.decode.requests import Completion
from isheep_jax.directory_lock import owned
from isheep_jax.errors import UserError
from isheep_jax.files import read_json, utf8, write_atomically, write_json

# What a kill can cost: so many completions, or those of so many seconds where they come faster.
_PART = 32
_SECONDS = 2.0
_SETTINGS = "settings.json"
# Fields of a completion that are kept.
_FIELDS = ("text", "finish_reason", "error")


@contextlib.contextmanager
def kept_completions(directory: epath.Path, settings: Mapping[str, Any]) -> Iterator["KeptCompletions"]:
    """Yields the completions that are kept in a directory, which this process owns until the context ends.

    Raises UserError as `KeptCompletions`, and where another process works there.
    """
    with owned("--output", directory):
        kept = KeptCompletions(directory, settings)
        try:
            yield kept
        finally:
            kept.flush()
    # Empty after `remove`, unless another process has begun there.
    with contextlib.suppress(OSError):
        directory.rmdir()


class KeptCompletions:
    """The completions in a directory. A part is there whole or not at all; one that is damaged is made again."""

    def __init__(self, directory: epath.Path, settings: Mapping[str, Any]):
        """Opens the directory, or makes it.

        settings: what the completions depend on besides their prompts, as JSON values.
        Raises UserError where the directory has completions that were made with other settings.
        """
        self._directory = directory
        self._check(json.loads(json.dumps(settings)))
        parts = sorted(directory.glob("part-*.jsonl"), key=lambda path: path.name)
        self._kept = {key: completion for path in parts for key, completion in _read(path)}
        # A name is used once, whatever parts are missing.
        self._next = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        self._waiting: list[tuple[str, Completion]] = []
        self._written = time.monotonic()

    def find(self, id: str, prompt: str) -> Completion | None:
        """Returns the completion of a request, if it is there; an id with another prompt has none."""
        found = self._kept.get(_key(id, prompt))
        return found and replace(found, id=id)

    def add(self, completion: Completion, prompt: str) -> None:
        """Keeps a completion; it is on the disk soon after, or with `flush`."""
        self._waiting.append((_key(completion.id, prompt), completion))
        if len(self._waiting) >= _PART and time.monotonic() - self._written >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on the disk yet."""
        if not self._waiting:
            return
        lines = "".join(
            json.dumps({"key": key, **{name: getattr(completion, name) for name in _FIELDS}}, ensure_ascii=False) + "\n"
            for key, completion in self._waiting
        )
        write_atomically(self._path(self._next), f"{_digest(lines)}\n".encode() + utf8(lines))
        self._waiting, self._next, self._written = [], self._next + 1, time.monotonic()

    def remove(self) -> None:
        """Removes all that is kept: the output has it."""
        self._waiting = []
        for path in (*self._directory.glob("part-*.jsonl"), self._directory / _SETTINGS):
            path.unlink(missing_ok=True)

    def _path(self, index: int) -> epath.Path:
        return self._directory / f"part-{index:06d}.jsonl"

    def _check(self, settings: dict[str, Any]) -> None:
        path = self._directory / _SETTINGS
        if not path.exists():
            there = self._directory.iterdir() if self._directory.exists() else ()
            if any(not path.name.startswith(".") for path in there):
                raise UserError(f"--output: {self._directory} holds something else; remove it, or name another output")
            write_json(path, settings)
            return
        before = read_json(path)
        before = before if isinstance(before, dict) else {}
        differ = [
            f"{name} was {json.dumps(before.get(name))[:60]}, now {json.dumps(settings.get(name))[:60]}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if differ:
            raise UserError(
                f"--output: {self._directory} has completions that were made with other settings: {'; '.join(differ)}; "
                "remove it, or name another output"
            )


def _read(path: epath.Path) -> list[tuple[str, Completion]]:
    """Returns the completions of a part with their keys; none of a damaged one."""
    digest, _, lines = path.read_bytes().decode("utf-8", "replace").partition("\n")
    if digest != _digest(lines):
        return []
    rows = [json.loads(line) for line in lines.split("\n") if line]
    return [(row["key"], Completion("", **{name: row[name] for name in _FIELDS})) for row in rows]


def _key(id: str, prompt: str) -> str:
    return f"{id}/{_digest(prompt)}"


def _digest(text: str) -> str:
    return hashlib.sha256(utf8(text)).hexdigest()
