"""Results of evaluated models as lines of text: a table per task, published figures below, and warnings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isheep_jax.cli.results import table_line
from isheep_jax.evaluation.reference import ReferenceRow, reference_rows
from isheep_jax.evaluation.tasks import TASKS

# A share of responses cut off by the limit of tokens that is worth a warning.
MANY_UNFINISHED = 0.05

# A task's entry in `evaluation.json`, and the whole file by task.
Result = Mapping[str, Any]
Results = Mapping[str, Result]

# What a column shows: a figure, or the mean of several.
Figures = tuple[str, ...]


def evaluation_lines(models: Sequence[tuple[str, Results]], base: str | None = None) -> list[str]:
    """Returns a table of the main figures if there are several tasks, then a table of each task, then warnings.

    models: label and results of each, in the order of the rows.
    base: name of their base (`reference.base_of`); figures that were published for it are shown below.
    """
    tasks = _tasks(models)
    blocks = [summary_lines(models)] if len(tasks) > 1 else []
    for task in tasks:
        rows = [(label, results[task]) for label, results in models if task in results]
        blocks.append(task_lines(task, rows, reference_rows(base, task)))
    blocks.append(warning_lines(models))
    return [line for block in blocks if block for line in ("", *block)][1:]


def summary_lines(models: Sequence[tuple[str, Results]]) -> list[str]:
    """Returns a table with a row per model and the main figure of each task as columns."""
    tasks = _tasks(models)
    rows = [
        [_cell(results[task], (results[task]["main"],)) if task in results else "" for task in tasks]
        for _, results in models
    ]
    header = [
        " ".join([task, *_parts(result for _, results in models if (result := results.get(task)))]) for task in tasks
    ]
    return _table(["value ± standard error", *header], [label for label, _ in models], rows)


def _parts(results: Iterable[Result]) -> list[str]:
    """Returns which part of a task was used, of results that did not use all of it."""
    return list(dict.fromkeys(f"({r['count']}/{r['of']})" for r in results if r["count"] < r["of"]))


def task_lines(
    task: str,
    models: Sequence[tuple[str, Result]],
    references: Sequence[ReferenceRow] = (),
) -> list[str]:
    """Returns the table of one task: a row per model with value ± standard error, and published figures below.

    models: label and result of each. references: published figures; those of figures that are not shown are left out.
    """
    first = models[0][1]
    parts = {_samples(result) for _, result in models}
    if len(parts) > 1:
        models = [(f"{label} {_samples(result)}", result) for label, result in models]
    columns = [(name,) for name in (first["main"], *_shown(task, first)) if name in first["figures"]]
    means = [row.figures for row in references if len(row.figures) > 1 and set(row.figures) <= set(first["figures"])]
    if not columns:
        return [f"{first['title']}: no figures, because the responses are not judged"]
    sections = [columns, *([figures] for figures in dict.fromkeys(means))]
    references = [row for row in references if any(row.figures in section for section in sections)]
    origins = list(dict.fromkeys((row.source, row.setting) for row in references))
    lines = [" ".join([first["title"], *(parts if len(parts) == 1 else [])]) + ": value ± standard error"]
    for section in sections:
        lines += [f"  {line}" for line in _section(section, models, references, origins)]
    for number, (source, setting) in enumerate(origins, 1):
        tables = dict.fromkeys(row.table for row in references if (row.source, row.setting) == (source, setting))
        where = source + (f", table {' and '.join(tables)}" if any(tables) else "")
        lines.append(f"  [{number}] another harness's: {where} ({setting})")
    return lines


def _shown(task: str, result: Result) -> Sequence[str]:
    """Returns the figures besides the main one; of a task that is not in the table, the first ones."""
    if task in TASKS:
        return TASKS[task].shown
    return [name for name in result["figures"] if name != result["main"]][:3]


def _samples(result: Result) -> str:
    """Returns how many samples were used."""
    count, of = result["count"], result["of"]
    return f"({count} of {of} samples)" if count < of else f"({of} sample{'' if of == 1 else 's'})"


def _section(
    columns: Sequence[Figures],
    models: Sequence[tuple[str, Result]],
    references: Sequence[ReferenceRow],
    origins: Sequence[tuple[str, str]],
) -> list[str]:
    """Returns a table of the columns: the models, then the published ones with the number of their origin."""
    published: dict[str, dict[Figures, str]] = {}
    for row in references:
        if row.figures in columns:
            label = f"{row.what} [{origins.index((row.source, row.setting)) + 1}]"
            published.setdefault(label, {})[row.figures] = _number(row.value)
    own = [[_cell(result, figures) for figures in columns] for _, result in models]
    header = ["", *(figures[0] if len(figures) == 1 else f"mean of {' and '.join(figures)}" for figures in columns)]
    others = [[values.get(figures, "") for figures in columns] for values in published.values()]
    return _table(header, [*(label for label, _ in models), *published], [*own, *others])


def _cell(result: Result, figures: Figures) -> str:
    known = [result["figures"][name] for name in figures if name in result["figures"]]
    if len(known) < len(figures):
        return ""
    value = sum(figure["value"] for figure in known) / len(known)
    # The figures of a mean are correlated, so that their standard errors do not give its own.
    return _number(value) + (f" ± {_number(known[0]['stderr'], value)}" if len(known) == 1 else "")


def _number(number: float, value: float | None = None) -> str:
    """Returns a number with the digits of `value` (None: its own): three for shares, two for points."""
    return format(number, ".3f" if abs(number if value is None else value) <= 1 else ".2f")


def _table(header: Sequence[str], labels: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: labels to the left, cells to the right of their columns."""
    rows = [header[1:], *rows]
    labels = [header[0], *labels]
    columns = [max(column, key=len) for column in zip(*rows, strict=True)]
    width = max(map(len, labels))
    return [f"{label:{width}}  {table_line(row, columns)}".rstrip() for label, row in zip(labels, rows, strict=True)]


def warning_lines(models: Sequence[tuple[str, Results]]) -> list[str]:
    """Returns a line for each task whose figures say less than they seem to: unfinished or missing responses."""
    lines = []
    for task in _tasks(models):
        rows = [(label, results[task]) for label, results in models if task in results]
        cut = [f"{r['unfinished']:.0%} of {label}" for label, r in rows if r["unfinished"] > MANY_UNFINISHED]
        missing = [f"{r['unanswered']} of {label}" for label, r in rows if r["unanswered"]]
        if cut:
            lines.append(f"{task}: many responses were cut off by the limit of new tokens ({', '.join(cut)})")
        if missing:
            counts = "are left out" if any("loss" in result for _, result in rows) else "count as wrong"
            lines.append(f"{task}: responses that do not fit into the context {counts} ({', '.join(missing)})")
    return lines


def _tasks(models: Sequence[tuple[str, Results]]) -> list[str]:
    return list(dict.fromkeys(task for _, results in models for task in results))
