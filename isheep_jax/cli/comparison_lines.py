"""The comparison of two evaluated models as lines of text: differences with intervals, and samples that changed."""

from collections.abc import Sequence

from isheep_jax.cli.results import table_line
from isheep_jax.evaluation.comparison import Change, Difference, TaskComparison

# Scores that are shown, the main one first.
SCORES = 8
# Changed samples that are shown: so many that got worse, and as many that got better.
SHOWN = 3
# Characters of a prompt or response that are shown.
CHARACTERS = 160

_COLUMNS = ("A", "B", "B - A", "95 % interval", "better", "worse", "p")


def comparison_lines(a: str, b: str, comparisons: Sequence[TaskComparison], refused: Sequence[str]) -> list[str]:
    """Returns the lines of all tasks.

    Args:
        a: Name of the first model.
        b: Name of the second.
        comparisons: Of the tasks that could be compared.
        refused: Why others could not, a line each.
    """
    lines = [f"A: {a}", f"B: {b}"]
    for comparison in comparisons:
        lines += ["", *task_lines(comparison)]
    return [*lines, *([""] if refused else []), *refused]


def task_lines(comparison: TaskComparison) -> list[str]:
    """Returns the differences of a task's scores, what to know about them, and the first samples that changed."""
    names = sorted(comparison.differences, key=lambda name: name != comparison.main)[:SCORES]
    width = max(map(len, names))
    rows = {name: _cells(comparison.differences[name]) for name in names}
    columns = [max(column, key=len) for column in zip(_COLUMNS, *rows.values(), strict=True)]
    lines = [_title(comparison), f"  {'':{width}}  {table_line(_COLUMNS, columns)}"]
    lines += [f"  {name:{width}}  {table_line(cells, columns)}" for name, cells in rows.items()]
    if len(comparison.differences) > SCORES:
        lines.append(f"  {len(comparison.differences) - SCORES} more scores with --output")
    lines += [f"  {note}" for note in comparison.notes]
    return [*lines, *(f"  {line}" for line in _change_lines(comparison))]


def _title(comparison: TaskComparison) -> str:
    only = [f"{n} only in {name}" for name, n in (("A", comparison.only_a), ("B", comparison.only_b)) if n]
    return ", ".join([f"{comparison.title}: {_samples(comparison.samples)}", *only])


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"


def _cells(difference: Difference) -> list[str]:
    digits = ".3f" if max(abs(difference.a), abs(difference.b)) <= 1 else ".2f"
    signed = [format(x, f"+{digits}") for x in (difference.difference, difference.low, difference.high)]
    return [
        format(difference.a, digits),
        format(difference.b, digits),
        signed[0],
        f"{signed[1]} to {signed[2]}",
        str(difference.better),
        str(difference.worse),
        "<0.001" if difference.p < 0.001 else f"{difference.p:.3f}",
    ]


def _change_lines(comparison: TaskComparison) -> list[str]:
    worse = [change for change in comparison.changed if change.gain < 0]
    better = comparison.changed[len(worse) :]
    if not comparison.changed:
        return [f"no sample changed in {comparison.main}"]
    lines = []
    for name, changes in (("worse", worse), ("better", better)):
        shown = changes[:SHOWN]
        first = f", the first {len(shown)}" if len(shown) < len(changes) else ""
        lines += [f"{_samples(len(changes))} got {name} in {comparison.main}{first}{':' if shown else ''}"]
        lines += [line for change in shown for line in _sample_lines(change)]
    return lines


def _sample_lines(change: Change) -> list[str]:
    a, b = " ".join(change.response_a.split()), " ".join(change.response_b.split())
    # Where they begin alike, what they differ in is shown, after a few words.
    alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = alike - CHARACTERS // 4 if alike > CHARACTERS // 2 else 0
    return [
        f"  {change.sample}  {_middle_cut(' '.join(change.prompt.split()))}",
        f"    A {change.score_a:g}  {_clipped(a, start)}",
        f"    B {change.score_b:g}  {_clipped(b, start)}",
    ]


def _middle_cut(line: str) -> str:
    """Returns a prompt's begin and end: worked examples lead, and the question comes last."""
    half = (CHARACTERS - 5) // 2
    return line if len(line) <= CHARACTERS else f"{line[:half]} ... {line[-half:]}"


def _clipped(line: str, start: int = 0) -> str:
    before, after = "..." if start else "", "..." if len(line) - start > CHARACTERS else ""
    return f"{before}{line[start : start + CHARACTERS - len(before + after)]}{after}"
