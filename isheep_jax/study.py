"""The rows of a table of the paper, or of this project's own, over several seeds: `--config=tiny --study=filters`.

Runs that are there are not repeated, so the same command goes on where it stopped; several processes may share the work
by --seeds.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

from isheep_jax.cli.arguments import parse_config, run_command
from isheep_jax.config import Config
from isheep_jax.errors import UserError
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.studies.definitions import STUDIES, Row, Study, chosen_rows, named_study

if TYPE_CHECKING:
    from isheep_jax.studies.runs import Result

MODULE = "isheep_jax.study"
USAGE = f"python -m {MODULE} --config=NAME --study=NAME [--seeds N ...] [--section.field=value ...]"


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing of the study, and prints its tables. Raises `UserError` for bad input."""
    options, rest = _parser().parse_known_args(arguments)
    study = named_study(options.study)
    rows = chosen_rows(study, options.rows)
    named, config = _configs(options.config, rest)
    study.check(config)
    if len({Path(base).name for base in options.base or ()}) < len(options.base or ()):
        raise UserError("--base: two bases have the same name; rename the directory of one")
    settings = [row.settings(config) for row in rows]

    # Here, so that --help and misspelled settings answer at once: these bring in jax.
    from isheep_jax.loop.algorithm import read_inputs
    from isheep_jax.runtime.locate import locate_judge
    from isheep_jax.studies import figure, report

    for option in ("results", "figure"):
        path = getattr(options, option)
        if path and not path.parent.is_dir():
            raise UserError(f"--{option}: there is no directory {path.parent}")
    if options.figure:
        figure.check(options.figure)
    if not options.report:
        for each in settings:
            # Hours may pass before it is the turn of a row that lacks a file.
            read_inputs(each, locate_judge(each))
    results = _results(study, rows, settings, named, options)
    if not results:
        raise UserError(f"--report: {config.workdir} has no run of this study yet; without --report they are made")
    print("\n" + report.markdown(study, rows, results, config), flush=True)
    if options.results:
        options.results.write_text(json.dumps(report.values(study, rows, results, config), indent=1) + "\n")
    if options.figure:
        figure.draw(options.figure, study, rows, results)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In one line, as other bad input."""
        raise UserError(f"{message}; --help lists all options")


def _parser() -> argparse.ArgumentParser:
    studies = "\n".join(
        f"  {name}: {study.title} ({', '.join(r.name for r in study.rows)})" for name, study in STUDIES.items()
    )
    parser = _Parser(
        prog=f"python -m {MODULE}",
        usage=USAGE,
        description=__doc__,
        epilog=f"Studies (--study=NAME), with their rows:\n{studies}\n\n"
        "Every setting of the config may follow, as of `python -m isheep_jax.train --help`; all rows have it, such as\n"
        "--evaluate.tiny.split=test --evaluate.limit=1000 for the final figures. --workdir is where the runs go\n"
        "(runs/study).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME", help=f"one of {', '.join(config_names())}")
    parser.add_argument("--study", required=True, metavar="NAME", help="see below")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="seeds of the runs (1 2 3)"
    )
    parser.add_argument("--base", nargs="+", metavar="DIR", help="base models (the config's)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="which rows (all)")
    parser.add_argument("--report", action="store_true", help="run nothing: report the runs that are there")
    parser.add_argument("--results", type=Path, metavar="FILE", help="also write all figures to this JSON file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw them into this PNG or SVG file")
    return parser


def _configs(name: str, settings: Sequence[str]) -> tuple[Config, Config]:
    """The named config, and the one that all rows start from."""
    config = parse_config([f"--config={name}", *settings], MODULE)
    if any(word.partition("=")[0] == "--seed" for word in settings):
        raise UserError("--seed: a study has several; give them with --seeds")
    if not config.evaluate.tasks:
        raise UserError("--evaluate.tasks: it is empty, but a study compares accuracies; name a task")
    if "://" in config.workdir:
        raise UserError("--workdir: runs of a study share files by links; name a directory on a disk")
    return named_config(name), replace(config, workdir=config.workdir or "runs/study")


def _results(
    study: Study, rows: Sequence[Row], settings: Sequence[Config], named: Config, options: argparse.Namespace
) -> "dict[str, dict[str, dict[int, Result]]]":
    """What came of the runs, by base, row and seed; each is made unless it is there, or left out with --report."""
    from isheep_jax.studies import report, runs

    begun, made, shared = time.monotonic(), 0, 0
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for base in options.base or [settings[0].model.path]:
        # In the study's order, whatever is there.
        by_row = found[Path(base).name] = {row.name: {} for row in rows}
        for seed in options.seeds:
            for row, each in zip(rows, settings, strict=True):
                config = runs.place(each, named, base, seed)
                result = runs.result(config) if options.report else runs.obtain(config, _workshop())
                if result is None:
                    continue
                by_row[row.name][seed] = result
                line = f"{Path(base).name} seed {seed} {row.name}: {report.line(result, study.measure)}"
                if result.seconds is not None:
                    made, shared = made + 1, shared + len(result.shared)
                    line += f"  ({result.seconds:.0f} s, {len(result.shared)} stages shared)"
                print(line + (f"  stopped: {result.stopped}" if result.stopped else ""), flush=True)
    if made:
        print(f"{made} runs made in {time.monotonic() - begun:.0f} s, {shared} of their stages by other runs")
    return {base: by_row for base, by_row in found.items() if any(by_row.values())}


class _Quiet:
    """A reporter for runs of which only the figures matter."""

    def stage(self, iteration: int, name: str, total: int, unit: str):
        return nullcontext(SimpleNamespace(advance=lambda n=1, **notes: None))

    def row(self, row: dict) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        print(f"  {text}", flush=True)


def _workshop():
    from isheep_jax.evaluation.tasks import evaluators, held_out_texts
    from isheep_jax.runtime.backend import JaxBackend
    from isheep_jax.studies.runs import Workshop

    return Workshop(JaxBackend, evaluators, held_out_texts, _Quiet)


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
