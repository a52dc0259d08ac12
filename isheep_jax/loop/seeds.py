"""Seed tasks: the few written by people that the model sees as examples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isheep_jax.errors import UserError


@dataclass(frozen=True)
class Seed:
    """A task. id: "seed-001" is the first of the file; output may be empty, since prompts need not show it."""

    id: str
    instruction: str
    input: str
    output: str


def read_seeds(path: Path, shots: int) -> list[Seed]:
    """Seed tasks of a JSON Lines file, in its order.

    A line is an object with `instruction`, `input` and `output` (Alpaca's fields; the last two may be missing), or with
    `instruction` and `instances`, a list whose first member has `input` and `output` (Self-Instruct's).
    Raises UserError that names the file and line of what is not, and when there are fewer seeds than `shots`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"synthesize.seeds: cannot read {path}: {reason}") from error
    seeds = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            instruction, input, output = _fields(path, number, line)
            seeds.append(Seed(f"seed-{len(seeds) + 1:03d}", instruction, input, output))
    if not seeds:
        raise UserError(f"synthesize.seeds: {path} is empty; it needs one task per line")
    if len(seeds) < shots:
        raise UserError(
            f"synthesize.shots: {shots} seeds per prompt, but {path} has only {len(seeds)}; "
            f"use at most {len(seeds)} or add seeds"
        )
    return seeds


def _fields(path: Path, number: int, line: str) -> tuple[str, str, str]:
    def bad(what: str) -> UserError:
        return UserError(f"synthesize.seeds: {path}, line {number}: {what}")

    try:
        task: Any = json.loads(line)
    except ValueError as error:
        raise bad(f"not JSON ({error}); every line is one object") from error
    if not isinstance(task, dict):
        raise bad('not an object; it should be like {"instruction": "...", "input": "...", "output": "..."}')
    fields = dict(task)
    if "instances" in fields:
        instances = fields["instances"]
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            raise bad("'instances' should be a list of objects with input and output")
        fields = {**instances[0], "instruction": fields.get("instruction")}
    values = []
    for name in ("instruction", "input", "output"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"'{name}' should be text")
        values.append((value or "").strip())
    if not values[0]:
        raise bad("there is no 'instruction'")
    return values[0], values[1], values[2]
