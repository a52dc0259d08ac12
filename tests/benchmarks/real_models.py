"""What a study on a real model found: figures with intervals over prompts, the funnel, kept and dropped records.

python tests/benchmarks/real_models.py --config=NAME --study=real_model --evaluate.tasks=ifeval,self_instruct [...]

The arguments are those of `python -m isheep_jax.study`, so that the same runs are found; iterations that are not
measured are left out. Prints Markdown. The study's own table (`--report`) has intervals over seeds, which are few here.
These are over prompts: a run's figures on the same prompts as the base's, and as those of random selection, all seeds
together.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from isheep_jax.config import Config
from isheep_jax.evaluation.comparison import Difference, paired_difference
from isheep_jax.evaluation.saved import find_evaluation
from isheep_jax.evaluation.tasks import TASKS
from isheep_jax.loop.protocols import TaskResult
from isheep_jax.named_configs import named_config
from isheep_jax.studies.definitions import Row, chosen_rows, named_study
from isheep_jax.studies.runs import with_run_directory
from isheep_jax.study import COMMAND

# The row that others are compared with, besides the base model.
CONTROL = "random"
# Kept and dropped records that are shown of the first row, and most characters of their texts.
SHOWN = 10
CHARACTERS = 280
# Stages of the funnel.
STAGES = ("instructions", "responses", "scores", "selected")

# Values of each sample of an evaluation, by figure.
Units = Mapping[str, Mapping[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A measured iteration of a run. results: content of its `evaluation.json`, by task."""

    row: Row
    seed: int
    iteration: int
    directory: Path
    results: Mapping[str, TaskResult]


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    study, settings = named_study(options.study), options.settings
    config = dataclasses.replace(settings, workdir=settings.workdir or "runs/study")
    rows = chosen_rows(study, options.rows or None)
    for base in options.base or [config.model.path]:
        runs = [run for row in rows for seed in options.seeds for run in _runs(row, options.config, base, seed, config)]
        print(f"## {Path(base).name}\n")
        # Also what was measured after the runs.
        for task in dict.fromkeys(task for run in runs for task in run.results):
            print("\n".join(_figures(task, rows, [run for run in runs if task in run.results])), "\n")
        print("\n".join(_funnel(rows, runs)), "\n")
        if learned := [run for run in runs if run.iteration]:
            print("\n".join(_records(learned[0])))


def _runs(row: Row, named: str, base: str, seed: int, config: Config) -> Iterator[Run]:
    directory = Path(with_run_directory(row.settings(config), named_config(named), base, seed).workdir)
    for iteration in range(config.iterations + 1):
        place = directory / f"iteration_{iteration}"
        if (place / "evaluation.json").exists():
            yield Run(row, seed, iteration, place, find_evaluation(place).results)


def _figures(task: str, rows: Sequence[Row], runs: Sequence[Run]) -> Iterator[str]:
    """Yields a table of the task's main figure: of each row and iteration, and its differences."""
    main = TASKS[task].main
    base = _units([run for run in runs if run.iteration == 0], task, main)
    yield f"*{TASKS[task].title}*, `{main}`: mean, and differences with 95 % intervals over {len(base)} prompts"
    yield ""
    yield f"| row | iteration | seeds | {main} | minus base | minus {CONTROL} |"
    yield "|---" * 6 + "|"
    if base:
        yield f"| base | 0 | | {_mean(base):.4f} | | |"
    for row in rows:
        for iteration in sorted({run.iteration for run in runs if run.row == row} - {0}):
            own = _units([run for run in runs if (run.row, run.iteration) == (row, iteration)], task, main)
            control = _units([r for r in runs if (r.row.name, r.iteration) == (CONTROL, iteration)], task, main)
            seeds = sum((run.row, run.iteration) == (row, iteration) for run in runs)
            against = "" if row.name == CONTROL else _difference(control, own)
            yield f"| {row.title} | {iteration} | {seeds} | {_mean(own):.4f} | {_difference(base, own)} | {against} |"


def _units(runs: Sequence[Run], task: str, figure: str) -> dict[str, list[float]]:
    """Returns the values of each sample, of all runs together."""
    units: dict[str, list[float]] = {}
    for run in runs:
        for (sample, _), answer in find_evaluation(run.directory).answers(task).items():
            value = answer.score.values.get(figure, [])
            units.setdefault(sample, []).extend([*value] if isinstance(value, Sequence) else [float(value)])
    return {sample: values for sample, values in units.items() if values}


def _mean(units: Mapping[str, Sequence[float]]) -> float:
    values = [value for values in units.values() for value in values]
    return sum(values) / len(values)


def _difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> str:
    found: Difference | None = paired_difference(a, b, sorted(a.keys() & b.keys()))
    return f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})" if found else ""


def _funnel(rows: Sequence[Row], runs: Sequence[Run]) -> Iterator[str]:
    """Yields how many records each stage kept, and why it dropped the others, of all seeds together."""
    yield "| row | stage | kept | of | dropped |"
    yield "|---" * 5 + "|"
    for row in rows:
        for stage in STAGES:
            manifests = [run.directory / stage / "DONE" for run in runs if run.row == row and run.iteration]
            found = [json.loads(path.read_text())["counts"] for path in manifests if path.exists()]
            dropped = sum((Counter(counts.get("dropped", {})) for counts in found), Counter())
            if total := sum(counts["records"] for counts in found):
                reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common(6))
                yield f"| {row.title} | {stage} | {total - dropped.total()} | {total} | {reasons} |"


def _records(run: Run) -> Iterator[str]:
    """Yields kept and dropped records, evenly spaced over an iteration."""
    directory = run.directory
    lines = [line for path in sorted((directory / "selected").glob("part-*")) for line in path.read_text().splitlines()]
    read = [line for path in sorted((directory / "scores").glob("part-*")) for line in path.read_text().splitlines()]
    readings = {record["id"]: record.get("readings") or {} for record in map(json.loads, read)}
    selected = list(map(json.loads, lines))
    for title, is_kept in (("Kept", True), ("Dropped", False)):
        records = [record for record in selected if record["verdict"]["kept"] == is_kept]
        yield f"{title}, {SHOWN} of {len(records)} ({run.row.title}, seed {run.seed}):"
        yield ""
        for k in range(min(SHOWN, len(records))):
            record = records[k * len(records) // min(SHOWN, len(records))]
            values = [
                f"{name} {value['value']:.1f}" + (f" over {value['tokens']} tokens" if value["tokens"] else "")
                for name, value in readings.get(record["id"], {}).items()
                if value["value"] is not None
            ]
            why = "; ".join(filter(None, [record["verdict"]["reason"], *values]))
            asked = " / ".join(filter(None, [record["instruction"], record["input"]]))
            yield f"- **{_short(asked)}** {_short(record['response'])}" + (f" ({why})" if why else "")
        yield ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS else f"{line[: CHARACTERS - 3]}..."


if __name__ == "__main__":
    main(sys.argv[1:])
