"""Published figures of models with the same base, from `reference.json`, to be shown beside a run's own.

They come from other harnesses, prompts and decoding, so they say where a figure should roughly lie, and no more.

`reference.json`: "bases" are models by name, with the sizes that tell them from others; "sources" are publications,
with the setting of each task ("*": of the others); "rows" are published models: base, what it is, source, the table in
it, "ablation" for a variant of a method, "note", and figures by task and name as published. A name such as
"prompt_strict + instruction_strict" is the mean of two figures.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Published in percent, except for these tasks.
POINTS = ("mt_bench",)

# A fine-tuned model may have a few tokens more than its base.
VOCABULARY_TOLERANCE = 0.01


@dataclass(frozen=True)
class ReferenceRow:
    """A published figure.

    base: model that it was made from. what: the published model, such as "I-SHEEP iteration 3".
    task, figures: names of ours; of several figures, it is their mean.
    value: a share from 0 to 1, or points where the task has points.
    source, table: where it was published. setting: how it was measured.
    ablation: whether it is a variant of a method, tried to be compared with the method itself.
    """

    base: str
    what: str
    task: str
    figures: tuple[str, ...]
    value: float
    source: str
    table: str
    setting: str
    ablation: bool = False


def base_of(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the base that a model was made from; None if it is none that figures are known of.

    A model is recognized by its sizes in `config.json`, because names of directories and repositories may be anything.
    Fine-tuning keeps the sizes, but may add a few tokens.
    """
    for name, sizes in _content()["bases"].items():
        others = {key: size for key, size in sizes.items() if key != "vocab_size"}
        vocabulary = config.get("vocab_size")
        near = isinstance(vocabulary, int) and _near(vocabulary, sizes["vocab_size"])
        if near and all(config.get(key) == size for key, size in others.items()):
            return name
    return None


def _near(size: int, other: int) -> bool:
    return abs(size - other) <= VOCABULARY_TOLERANCE * other


def reference_rows(base: str | None, task: str, ablations: bool = False) -> list[ReferenceRow]:
    """Returns the published figures of models with that base on the task, without ablations unless asked for."""
    rows = (row for row in _rows() if (row.base, row.task) == (base, task))
    return [row for row in rows if ablations or not row.ablation]


@functools.cache
def _content() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "reference.json").read_text(encoding="utf-8"))


@functools.cache
def _rows() -> tuple[ReferenceRow, ...]:
    return tuple(
        ReferenceRow(
            base=row["base"],
            what=row["what"],
            task=task,
            figures=tuple(names.split(" + ")),
            value=value if task in POINTS else round(value / 100, 6),
            source=_content()["sources"][row["source"]]["title"],
            table=row.get("table", ""),
            setting=_setting(row, task),
            ablation=row.get("ablation", False),
        )
        for row in _content()["rows"]
        for task, figures in row["figures"].items()
        for names, value in figures.items()
    )


def _setting(row: Mapping[str, Any], task: str) -> str:
    settings = _content()["sources"][row["source"]]["settings"]
    return "; ".join([settings.get(task, settings.get("*", "")), *([row["note"]] if "note" in row else [])])
