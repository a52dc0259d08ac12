"""The command that runs a study: variants of a config over several seeds, as in a table of the paper.

python -m isheep_jax.study --config=tiny --study=filters
"""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.cli.output import show
from isheep_jax.config import Config
from isheep_jax.errors import UserError
from isheep_jax.files import check_output, check_writable, write_json
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.named_configs import named_config
from isheep_jax.studies.definitions import STUDIES, Row, Study, chosen_rows, named_study

if TYPE_CHECKING:
    from isheep_jax.studies.runs import Result, RunFactory


@dataclass(frozen=True)
class StudyOptions(ConfigOptions):
    """Options of the command."""

    study: str = ""
    """Name of the study; they are listed below."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    base: tuple[str, ...] = ()
    """Base models. Empty: the config's."""
    rows: tuple[str, ...] = ()
    """Rows of the study to run. Empty: all."""
    report: bool = False
    """Run nothing: report the runs that are there."""
    results: str = ""
    """JSON file to write all figures to, too."""
    figure: str = ""
    """PNG or SVG file to draw the figures into, too."""


def _studies() -> str:
    """Returns the list of studies for `--help`."""
    studies = (f"  {name}: {s.title} ({', '.join(r.name for r in s.rows)})" for name, s in STUDIES.items())
    return "\n".join(["Studies (--study=NAME), with their rows:", *studies])


COMMAND = Command(
    module="isheep_jax.study",
    options=StudyOptions,
    usage=("--config=NAME --study=NAME [--seeds N ...] [--section.field=value ...]",),
    about="Runs the rows of a table of the paper, or of this project's own, over several seeds, and prints their "
    "figures. Runs that are there are not repeated, so the same command goes on where it stopped; several processes "
    "may share the work by --seeds. All rows have the settings that are given, such as --evaluate.tiny.split=test "
    "--evaluate.limit=1000 for final figures. --workdir is where the runs go (runs/study).",
    example="--config=tiny --study=filters",
    required=("study",),
    hidden=("seed",),  # a study takes --seeds
    closing=_studies,
)


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing of the study, and prints its tables. Raises `UserError` for bad input."""
    options = COMMAND.parse(arguments)
    study = named_study(options.study)
    if not options.seeds:
        raise UserError("--seeds: the list is empty; name a seed, such as --seeds 1")
    rows = chosen_rows(study, options.rows or None)
    config = _config_of_all_rows(options.settings)
    study.check(config)
    if len({Path(base).name for base in options.base}) < len(options.base):
        raise UserError("--base: two bases have the same name; rename the directory of one")
    settings = [row.settings(config) for row in rows]

    # Imported here so that --help and misspelled settings answer at once: these bring in jax.
    from etils import epath

    from isheep_jax.evaluation.tasks import held_out_texts
    from isheep_jax.loop.filters.normalization import normalize
    from isheep_jax.loop.inputs import read_inputs
    from isheep_jax.runtime.locate import locate_judge
    from isheep_jax.studies import figure, report

    outputs = {
        name: check_output(f"--{name}", getattr(options, name))
        for name in ("results", "figure")
        if getattr(options, name)
    }
    if "figure" in outputs:
        figure.check(outputs["figure"])
    if not options.report:
        check_writable("--workdir", epath.Path(config.workdir), make=False)
        for row_settings in settings:
            # Hours may pass before a row that lacks a file or seeds would be run.
            held_out = frozenset(map(normalize, held_out_texts(row_settings.evaluate)))
            read_inputs(row_settings, locate_judge(row_settings), held_out)
    results = _results(study, rows, settings, options)
    if not results:
        raise UserError(f"--report: {config.workdir} has no run of this study yet; without --report they are made")
    show("\n" + report.markdown(study, rows, results, config))
    if "results" in outputs:
        write_json(outputs["results"], report.values(study, rows, results, config))
    if "figure" in outputs:
        figure.draw(outputs["figure"], study, rows, results)


def _config_of_all_rows(config: Config) -> Config:
    """Returns the config that all rows start from. Raises `UserError` for one that no study can use."""
    if not config.evaluate.tasks:
        raise UserError("--evaluate.tasks: it is empty, but a study compares accuracies; name a task")
    if "://" in config.workdir:
        raise UserError("--workdir: runs of a study share files by links; name a directory on a disk")
    return replace(config, workdir=config.workdir or "runs/study")


def _results(
    study: Study, rows: Sequence[Row], settings: Sequence[Config], options: StudyOptions
) -> "dict[str, dict[str, dict[int, Result]]]":
    """Returns the results of the runs by base, row and seed; runs that are missing are made, or skipped by --report."""
    from isheep_jax.studies import report, runs

    named = named_config(options.config)
    begun, made, shared = time.monotonic(), 0, 0
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for base in options.base or [settings[0].model.path]:
        # In the order of the study, not of the seeds.
        by_row = found[Path(base).name] = {row.name: {} for row in rows}
        for seed in options.seeds:
            for row, row_settings in zip(rows, settings, strict=True):
                config = runs.with_run_directory(row_settings, named, base, seed)
                result = runs.read_result(config) if options.report else runs.run_or_resume(config, _run_factory())
                if result is None:
                    continue
                by_row[row.name][seed] = result
                line = f"{Path(base).name} seed {seed} {row.name}: {report.line(result, study.measure)}"
                if result.seconds is not None:
                    made, shared = made + 1, shared + len(result.shared)
                    line += f"  ({result.seconds:.0f} s, {len(result.shared)} stages shared)"
                show(line + (f"  stopped: {result.stopped}" if result.stopped else ""))
    if made:
        show(f"{made} runs made in {time.monotonic() - begun:.0f} s, {shared} of their stages by other runs")
    return {base: by_row for base, by_row in found.items() if any(by_row.values())}


class _NoProgress:
    """The `StageReporter` of a stage whose progress is not shown."""

    def advance(self, n: int = 1, **notes: object) -> None:
        pass

    def update(self, done: int, total: int, **notes: object) -> None:
        pass


class WarningReporter:
    """The `Reporter` of a study's runs: prints warnings and nothing else."""

    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> AbstractContextManager[_NoProgress]:
        return nullcontext(_NoProgress())

    def row(self, summary: IterationSummary) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        show(f"  {text}")


def _run_factory() -> "RunFactory":
    from isheep_jax.evaluation.tasks import held_out_texts
    from isheep_jax.runtime.backend import JaxBackend
    from isheep_jax.runtime.run import evaluators_of
    from isheep_jax.studies.runs import RunFactory

    return RunFactory(JaxBackend, evaluators_of, held_out_texts, WarningReporter)


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
