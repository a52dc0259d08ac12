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
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from isheep_jax.command import parse_config, run_command
from isheep_jax.config import Config, config_names, named_config
from isheep_jax.errors import UserError
from isheep_jax.studies.definitions import STUDIES, Row, Study, chosen_rows, named_study

MODULE = "isheep_jax.study"
USAGE = f"python -m {MODULE} --config=NAME --study=NAME [--seeds N ...] [--section.field=value ...]"


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing of the study, and prints its tables. Raises `UserError` for bad input."""
    options, rest = _parser().parse_known_args(arguments)
    study = named_study(options.study)
    rows = chosen_rows(study, options.rows)
    named, config = _configs(options.config, rest)
    study.check(config)
    settings = [row.settings(config) for row in rows]

    # Here, so that --help and misspelt settings answer at once: these bring in jax.
    from isheep_jax.loop.iteration import read_inputs
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
            read_inputs(each)
    bases = options.base or [config.model.path]
    if len({Path(base).name for base in bases}) < len(bases):
        raise UserError("--base: two bases have the same name; rename the directory of one")
    root = Path(config.workdir or "runs/study")
    results = _Runs(study, rows, settings, named, root, options).results(bases)
    if not results:
        raise UserError(f"--report: no run of this study is in {root} yet; the same command without it makes them")
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
        "--evaluate.split=test --evaluate.prompts=1000 for the final figures. --workdir is where the runs go\n"
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
        raise UserError("--evaluate.tasks: it is empty, but a study compares accuracies; name a benchmark")
    if "://" in config.workdir:
        raise UserError("--workdir: runs of a study share files by links; name a directory on a disk")
    return named_config(name), config


class _Runs:
    """The runs of a study, each made unless it is there."""

    def __init__(
        self,
        study: Study,
        rows: Sequence[Row],
        settings: Sequence[Config],
        named: Config,
        root: Path,
        options: argparse.Namespace,
    ):
        self._study, self._rows, self._settings = study, rows, settings
        self._named, self._root, self._options = named, root, options

    def results(self, bases: Sequence[str]) -> dict[str, dict[str, dict[int, "object"]]]:
        """By base, row and seed; only of runs that are there."""
        from isheep_jax.studies import report, runs

        begun, made, linked, found = time.monotonic(), 0, 0, {}
        for base in bases:
            for seed in self._options.seeds:
                for row, settings in zip(self._rows, self._settings, strict=True):
                    config = runs.place(settings, self._named, self._root, base, seed)
                    result = runs.result(config) if self._options.report else runs.obtain(config, _workshop())
                    if result is None:
                        continue
                    found.setdefault(Path(base).name, {}).setdefault(row.name, {})[seed] = result
                    if result.seconds is not None:
                        made, linked = made + 1, linked + len(result.shared)
                    self._say(base, seed, row, report.line(result, self._study.measure), result)
        if made:
            print(f"{made} runs made in {time.monotonic() - begun:.0f} s, {linked} of their stages by other runs")
        # The rows in the study's order, whatever is there.
        order = [row.name for row in self._rows]
        return {base: {name: by[name] for name in order if name in by} for base, by in found.items()}

    def _say(self, base: str, seed: int, row: Row, figures: str, result) -> None:
        time_ = "" if result.seconds is None else f"  ({result.seconds:.0f} s, {len(result.shared)} stages shared)"
        stopped = f"  stopped: {result.stopped}" if result.stopped else ""
        print(f"{Path(base).name} seed {seed} {row.name}: {figures}{time_}{stopped}", flush=True)


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
    from isheep_jax.runtime import JaxBackend, evaluators, held_out_instructions
    from isheep_jax.studies.runs import Workshop

    return Workshop(JaxBackend, evaluators, held_out_instructions, _Quiet)


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
