"""The results of a run as lines of text: a row per iteration, warnings, and answers before and after."""

import json
from collections.abc import Iterable, Sequence

from etils import epath

from isheep_jax.loop.protocols import ExampleAnswer, TaskResult
from isheep_jax.loop.summary import IterationSummary

# Kept answers this many times shorter than the first iteration's are worth a warning.
MUCH_SHORTER = 1.5
# A smaller share of responses that come to an end is warned of.
FEW_ENDED = 0.5

# Half the width of a 95 % interval of a mean, in standard errors.
NINETY_FIVE_PERCENT = 1.96


def row_cells(summary: IterationSummary) -> dict[str, str]:
    """Returns the columns of an iteration's row, as text."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = {
        "iteration": f"{summary.iteration}" if summary.iteration else "0 (base)",
        "instructions": number(summary.instructions, "d"),
        "kept": number(summary.kept, "d"),
        "quality": number(summary.mean_quality, ".2f"),
        "following": number(summary.mean_following, ".2f"),
        **{f"kept {name}": number(means["kept"], ".2f") for name, means in (summary.readings or {}).items()},
        "loss": number(summary.train_loss, ".3f"),
    }
    for task, result in summary.evaluation.items():
        for measure in ("accuracy", "loss"):
            if measure in result:
                half = NINETY_FIVE_PERCENT * result.get("stderr", 0.0)
                cells[f"{task} {measure} ± 95 %"] = f"{result[measure]:.3f} ± {half:.3f}"
    return cells


def table_line(values: Iterable[str], columns: Iterable[str]) -> str:
    """Returns the values as a line, each aligned to the right of its column."""
    return "  ".join(value.rjust(max(len(column), 6)) for value, column in zip(values, columns, strict=True))


def row_warnings(rows: Sequence[IterationSummary]) -> list[str]:
    """Returns warnings about the last of the rows: kept answers get much shorter, or few responses come to an end."""
    last, warnings = rows[-1], []
    lengths = [row.kept_characters for row in rows if row.kept_characters]
    if len(lengths) > 1 and last.kept_characters and lengths[-1] <= lengths[0] / MUCH_SHORTER:
        warnings.append(
            f"iteration {last.iteration}: the kept answers are much shorter than in the first iteration "
            f"({lengths[-1]:.0f} characters on average, then {lengths[0]:.0f})"
        )
    if last.ended is not None and last.ended < FEW_ENDED:
        warnings.append(
            f"iteration {last.iteration}: only {last.ended:.0%} of the responses came to an end before "
            "respond.max_tokens; the others were dropped"
        )
    return warnings


def before_and_after(directory: epath.Path, rows: Sequence[IterationSummary], count: int = 3) -> list[str]:
    """Returns lines with held-out instructions, the base model's answers and those of the last iteration.

    They are spread evenly over the examples of the first task that has some, not chosen by how they were answered.
    """
    last = max((row.iteration for row in rows), default=0)
    before, after = (_examples(directory / f"iteration_{i}" / "evaluation.json") for i in (0, last))
    if last == 0 or not before or len(before) != len(after):
        return []
    lines = [f"Held-out instructions, answered by the base model and after iteration {last}:"]
    for k in range(min(count, len(before))):
        index = k * len(before) // min(count, len(before))
        lines.append(f"  {before[index]['instruction']}")
        for name, example in (("before", before[index]), ("after ", after[index])):
            mark = {True: " (right)", False: " (wrong)", None: ""}[example["correct"]]
            lines.append(f"    {name}{mark}  {' / '.join(example['response'].split(chr(10)))}")
    return [*lines, ""]


def _examples(path: epath.Path) -> list[ExampleAnswer]:
    if not path.exists():
        return []
    results: dict[str, TaskResult] = json.loads(path.read_text())
    return next((result["examples"] for result in results.values() if result.get("examples")), [])
