"""Writes a study's tables as Markdown and JSON: means with intervals over seeds, and differences paired by seed."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from isheep_jax.config import Config, flatten
from isheep_jax.evaluation.tasks import TASKS
from isheep_jax.studies.definitions import Row, Study
from isheep_jax.studies.runs import Result, figure_at

# base model -> row -> seed -> result of the run
Results = Mapping[str, Mapping[str, Mapping[int, Result]]]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds. half: half the width of its 95 % interval (Student's t); None for one seed."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        count = len(values)
        if count < 2:
            return cls(values[0], None, count)
        half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.fmean(values), half, count)

    @property
    def is_beyond_zero(self) -> bool:
        """True where the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, sign: str = "") -> str:
        """Formats the mean and its interval; with sign="+" positive numbers have a sign, too."""
        return f"{self.mean:{sign}.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    def values(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "half_interval": self.half, "seeds": self.count}


def by_column(row: Row, result: Result, measure: str) -> dict[int, float]:
    """Returns a run's figures by column of the table; column 0 is the base model."""
    figures = {n + (row.column - 1 if n else 0): figure_at(e, measure) for n, e in enumerate(result.evaluations)}
    return {column: value for column, value in figures.items() if value is not None}


def estimates(row: Row, runs: Mapping[int, Result], measure: str) -> dict[int, Estimate]:
    """Returns the means over the seeds, by column."""
    return {column: Estimate.of(list(values.values())) for column, values in _columns(row, runs, measure).items()}


def differences(
    row: Row, runs: Mapping[int, Result], first: Row, first_runs: Mapping[int, Result], measure: str
) -> dict[int | str, Estimate]:
    """Returns the differences of a row to the first one, paired by seed, by column and for the "last" iteration.

    Args:
        row: the row.
        runs: its results, by seed.
        first: the first row.
        first_runs: its results, by seed.
        measure: the compared figure, as in `Study`.
    """
    ours, theirs = (
        _columns(*pair, measure) | {"last": _last(*pair, measure)} for pair in ((row, runs), (first, first_runs))
    )
    estimated = {}
    for column in ours.keys() & theirs.keys() - {0}:
        seeds = [seed for seed in ours[column] if seed in theirs[column]]
        if seeds:
            estimated[column] = Estimate.of([ours[column][seed] - theirs[column][seed] for seed in seeds])
    return estimated


def _columns(row: Row, runs: Mapping[int, Result], measure: str) -> dict[int | str, dict[int, float]]:
    columns: dict[int | str, dict[int, float]] = {}
    for seed, result in runs.items():
        for column, value in by_column(row, result, measure).items():
            columns.setdefault(column, {})[seed] = value
    return columns


def _last(row: Row, runs: Mapping[int, Result], measure: str) -> dict[int, float]:
    values = {seed: by_column(row, result, measure) for seed, result in runs.items()}
    return {seed: figures[max(figures)] for seed, figures in values.items() if max(figures, default=0) > 0}


def markdown(study: Study, rows: Sequence[Row], results: Results, config: Config) -> str:
    """Returns the study's section: for each base model the rows, their differences to the first, and every run.

    Args:
        study: the study.
        rows: those to show.
        results: of the runs that there are.
        config: the settings that all rows start from.
    """
    lines = [f"### {study.title}", ""]
    for base, by_row in results.items():
        measured = [row for row in rows if by_row.get(row.name)]
        lines += [*_heading(study, base, by_row, config), "", *_table(study, measured, by_row, config), ""]
        if len(measured) > 1:
            lines += [*_difference_table(study, measured, by_row), ""]
        lines += [*_every_run(study, measured, by_row), ""]
    numbers = "The paper's numbers: Qwen1.5-72B, IFEval prompt-level strict accuracy, %, one run each. "
    source = (numbers if any(row.paper for row in rows) else "") + study.source
    return "\n".join([*lines, source, ""])


def _heading(study: Study, base: str, by_row: Mapping[str, Mapping[int, Result]], config: Config) -> list[str]:
    what = study.measure or " and ".join(f"{task} {_measures(task)}" for task in config.evaluate.tasks)
    own = getattr(config.evaluate, config.evaluate.tasks[0], None)  # settings that only this task has
    split = f" ({', '.join(map(str, dataclasses.astuple(own)))})" if own is not None else ""
    seeds = sorted({seed for runs in by_row.values() for seed in runs})
    over = f"mean ± half the 95 % interval over seeds {', '.join(map(str, seeds))} (Student's t)"
    over = over if len(seeds) > 1 else f"seed {seeds[0]}"
    return [f"Base `{base}`: {what} on {_count(by_row, config)} held-out prompts{split}; {over}."]


def _count(by_row: Mapping[str, Mapping[int, Result]], config: Config) -> str:
    """Returns how many prompts each task used, as text: "512", or "512 and 30" for two tasks of different sizes."""
    results = (result for runs in by_row.values() for result in runs.values())
    evaluation = next(result.evaluations[0] for result in results if result.evaluations)
    counts = [figure_at(evaluation, f"{task}.count") for task in config.evaluate.tasks]
    return " and ".join(str(count) for count in dict.fromkeys(counts))


def _also_shown(config: Config, measure: str) -> list[str]:
    """Returns the paths of the figures shown next to the measure, for the base model and the last iteration."""
    tasks = config.evaluate.tasks
    paths = [f"{task}.{_measures(task)}" for task in tasks] if len(tasks) > 1 or measure else []
    paths += [f"{task}.{figure}" for task in tasks for figure in TASKS[task].shown]
    return [path for path in paths if path != measure]


def _measures(task: str) -> str:
    """Returns the name of the figure that stands for a task."""
    return TASKS[task].measures or TASKS[task].main


def _table(study: Study, rows: Sequence[Row], by_row: Mapping[str, Mapping[int, Result]], config: Config) -> list[str]:
    cells = {row.name: estimates(row, by_row[row.name], study.measure) for row in rows}
    last = max((column for estimated in cells.values() for column in estimated), default=0)
    also, extra = _also_shown(config, study.measure), {"kept pairs": "kept", **study.also_shown}
    with_paper = any(row.paper for row in rows)
    header = ["", "seeds", "base", *(f"iteration {n}" for n in range(1, last + 1)), *extra]
    header += [f"{path}, base to last" for path in also] + ["paper (%)"] * with_paper
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        runs = by_row[row.name]
        cell = [row.title, str(len(runs))]
        for column in range(last + 1):
            estimate = cells[row.name].get(column)
            fewer = f" ({estimate.count} of {len(runs)})" if estimate and estimate.count < len(runs) else ""
            cell.append(
                "" if estimate is None else (f"{estimate.mean:.3f}" if column == 0 else estimate.text()) + fewer
            )
        cell += [_by_iteration(runs.values(), path) for path in extra.values()]
        for path in also:
            of_seeds = _last(row, runs, path).values()
            base = [value for result in runs.values() if (value := figure_at(result.evaluations[0], path)) is not None]
            cell.append(f"{base[0]:.3f} → {Estimate.of(list(of_seeds)).text()}" if base and of_seeds else "")
        if with_paper:
            cell.append(" → ".join(f"{value:.2f}" for _, value in sorted(row.paper.items())))
        lines.append(_line(cell))
    return lines


def _difference_table(study: Study, rows: Sequence[Row], by_row: Mapping[str, Mapping[int, Result]]) -> list[str]:
    first = rows[0]
    cells = {row.name: differences(row, by_row[row.name], first, by_row[first.name], study.measure) for row in rows[1:]}
    columns = sorted({c for estimated in cells.values() for c in estimated if c != "last"})
    header = [f"minus {first.title}", *(f"iteration {n}" for n in columns), "last"]
    lines = ["Differences, paired by seed; bold if the interval excludes zero:", ""]
    lines += [_line(header), _line(["---"] * len(header))]
    for row in rows[1:]:
        estimated = [cells[row.name].get(column) for column in (*columns, "last")]
        texts = ["" if x is None else f"**{x.text('+')}**" if x.is_beyond_zero else x.text("+") for x in estimated]
        lines.append(_line([row.title, *texts]))
    return lines


def _every_run(study: Study, rows: Sequence[Row], by_row: Mapping[str, Mapping[int, Result]]) -> list[str]:
    lines = ["Every run (iterations 1, 2, ...):", ""]
    for row in rows:
        runs = [f"{seed}: {line(result, study.measure)}" for seed, result in by_row[row.name].items()]
        lines.append(f"- {row.title}: {' | '.join(runs)}")
        for seed, result in by_row[row.name].items():
            if result.stopped:
                lines.append(f"  - seed {seed} ended early: {result.stopped}")
    return lines


def line(result: Result, measure: str) -> str:
    """Formats a run's figures of iterations 1, 2, ..."""
    values = [figure_at(evaluation, measure) for evaluation in result.evaluations[1:]]
    return " ".join("-" if value is None else f"{value:.3f}" for value in values) or "none"


def _by_iteration(results: Iterable[Result], path: str) -> str:
    """Formats the means over the runs of a figure of summary.json, for each iteration."""
    by_number: dict[int, list[float]] = {}
    for result in results:
        for n, row in enumerate(result.rows[1:], start=1):
            if (value := figure_at(row, path)) is not None:
                by_number.setdefault(n, []).append(value)
    means = [statistics.fmean(values) for _, values in sorted(by_number.items())]
    return " / ".join(f"{mean:.0f}" if path == "kept" else f"{mean:.2f}" for mean in means)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def values(study: Study, rows: Sequence[Row], results: Results, config: Config) -> dict:
    """Returns all figures as JSON values. The arguments are those of `markdown`."""
    figures: dict = {"title": study.title, "source": study.source, "measure": study.measure or "accuracy"}
    figures |= {"config": config.name, "settings": flatten(config), "bases": {}}
    for base, by_row in results.items():
        measured = [row for row in rows if by_row.get(row.name)]
        figures["bases"][base] = {
            row.name: {
                "title": row.title,
                "changes": row.changed(config),
                "paper": dict(row.paper),
                "column": row.column,
                "mean": {c: x.values() for c, x in estimates(row, by_row[row.name], study.measure).items()},
                "minus_first_row": {
                    c: x.values()
                    for c, x in differences(
                        row, by_row[row.name], measured[0], by_row[measured[0].name], study.measure
                    ).items()
                },
                "runs": {
                    seed: {"iterations": result.rows, "evaluations": result.evaluations, "stopped": result.stopped}
                    for seed, result in by_row[row.name].items()
                },
            }
            for row in measured
        }
    return figures
