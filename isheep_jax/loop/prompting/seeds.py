"""Reads the seed tasks, which people wrote and prompts show as examples, in several common formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.loop.filters.labels import is_no_input
from isheep_jax.text_files import read_objects

# Names of the fields in other data sets.
_OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "task"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "target"),
}
# How a task looks.
_LIKE = '{"instruction": "...", "input": "...", "output": "..."}'
_CONVERSATIONS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Seed:
    """A seed task. id: "seed-001" is the first of the file. output may be empty if no prompt shows it."""

    id: str
    instruction: str
    input: str
    output: str


def read_seeds(path: epath.Path, shots: int, rules: str = "basic") -> list[Seed]:
    """Returns the seed tasks of a JSON Lines file, or of a file with one JSON array, in its order.

    A task is an object in one of three formats: Alpaca's (`instruction`, `input` and `output`; the last two may be
    missing), Self-Instruct's (`instruction`, and `instances`, a list whose first member has `input` and `output`), or
    `question` and `answer` in place of instruction and output.

    Args:
        path: The file.
        shots: Number of seeds that a prompt shows; there must be at least as many.
        rules: `synthesize.rules`. 'paper' and 'strict' are for English only and skip tasks whose `language` is another
            one; the other tasks keep their ids.

    Raises:
        UserError: A task is malformed, with the file and line (or, in an array, the task), or there are too few.
    """
    seeds = []
    for number, (where, task) in enumerate(read_objects(path, "synthesize.seeds", _LIKE), start=1):
        instruction, input, output, language = _fields(where, task)
        if rules == "basic" or language in ("", "en"):
            seeds.append(Seed(f"seed-{number:03d}", instruction, input, output))
    if len(seeds) < shots:
        english = " in English (synthesize.rules=basic takes the others, too)" if len(seeds) < number else ""
        raise UserError(
            f"synthesize.shots (or other_shots): {shots} seeds per prompt, but {path} has only {len(seeds)}{english}; "
            f"use at most {len(seeds)} or add seeds"
        )
    return seeds


def check_outputs(path: epath.Path, seeds: Sequence[Seed]) -> None:
    """Raises UserError if a task has no output, for settings that need the outputs."""
    missing = [seed.id for seed in seeds if not seed.output]
    if missing:
        raise UserError(
            f"synthesize.seeds: {path}: {len(missing)} of {len(seeds)} tasks have no output, {missing[0]} first; "
            "examples by similarity and training on seeds need all of them"
        )


def _fields(where: str, task: dict[str, Any]) -> tuple[str, str, str, str]:
    def bad(what: str) -> UserError:
        return UserError(f"synthesize.seeds: {where}: {what}")

    fields = dict(task)
    if "instances" in fields:
        instances = fields["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise bad("'instances' should be a list of objects with input and output")
        fields = {**fields, **instances[0], "instruction": fields.get("instruction")}
    for right, other in (("instruction", "question"), ("output", "answer")):
        if right not in fields and other in fields:
            fields[right] = fields.pop(other)
    other = _other_names(fields)
    if other:
        raise bad(
            f"{' and '.join(map(repr, other))} should be called {' and '.join(map(repr, other.values()))}; "
            "a task has the fields instruction, input and output"
        )
    values = []
    for name in ("instruction", "input", "output", "language"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"'{name}' should be text")
        values.append((value or "").strip())
    instruction, input, output, language = values
    if not instruction:
        conversation = [name for name in _CONVERSATIONS if name in fields]
        if conversation:
            raise bad(f"{conversation[0]!r} holds a conversation; a task has the fields instruction, input and output")
        raise bad("there is no 'instruction'")
    return instruction, "" if is_no_input(input) else input, output, language


def _other_names(fields: dict[str, Any]) -> dict[str, str]:
    """Returns the fields with a wrong name, each with the right one."""
    lower = {name.lower(): name for name in fields}
    renamed = {}
    for right, others in _OTHER_NAMES.items():
        if right not in fields:
            for other in (right, *others):
                if other in lower:
                    renamed[lower[other]] = right
                    break
    return renamed
