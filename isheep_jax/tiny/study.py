"""COMMAND  the tiny experiment with its controls: python -m isheep_jax.tiny.study --workdir runs/study

Runs every variant with every seed on every base through the same loop as `isheep_jax.train`, on held-out prompts, and
prints the table of the README. A run that is there already is not repeated, so the same command resumes; several
processes may share the work with --base and --seeds.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from isheep_jax.command import run_command
from isheep_jax.config import Config, named_config
from isheep_jax.tiny import CHECKPOINT, study_table
from isheep_jax.tiny.evaluate import PROMPTS
from isheep_jax.tiny.world import SPLITS


def _change(**sections: dict) -> Callable[[Config], Config]:
    """A variant as what it changes: _change(select={"rule": "random"}, iterations=1)."""

    def apply(config: Config) -> Config:
        values = {
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return dataclasses.replace(config, **values)

    return apply


# In the order of the table. Controls that do not look at scores draw one response per instruction: a random one of
# several has the same distribution.
VARIANTS: dict[str, tuple[str, Callable[[Config], Config]]] = {
    "loop": ("the loop of `--config=tiny`", _change()),
    "random": ("random selection, as many pairs", _change(select={"rule": "random"}, respond={"samples": 1})),
    "unfiltered": ("no filter, all pairs", _change(select={"rule": "none"}, respond={"samples": 1})),
    "once_fraction": ("one round, 3 x the instructions, same fraction", lambda config: _once(config, 1.0)),
    "once_pairs": ("one round, 3 x the instructions, as many pairs", lambda config: _once(config, 1 / 3)),
    "reference": (
        "the reference's rule: one response, sampled scores, both above 8",
        _change(
            select={"rule": "threshold", "threshold": 8.0, "buckets": "none", "following_ceiling": 10.0},
            respond={"samples": 1},
            assess={"read": "sampled"},
        ),
    ),
}


def _once(config: Config, share: float) -> Config:
    synthesize = dataclasses.replace(config.synthesize, instructions=3 * config.synthesize.instructions)
    select = dataclasses.replace(config.select, fraction=share * config.select.fraction)
    return dataclasses.replace(config, iterations=1, synthesize=synthesize, select=select)


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


def run_variant(config: Config, base: Path, variant: str, seed: int, report: bool = False) -> list[dict] | None:
    """Evaluations of iterations 0, 1, ... of one variant of `config` on `base`; runs it unless it is there.

    With `report` a run that is not there is None.
    """
    directory = config.directory / config.evaluate.split / base.name / variant / str(seed)
    config = VARIANTS[variant][1](config)
    model = dataclasses.replace(config.model, path=str(base))
    config = dataclasses.replace(config, workdir=str(directory), seed=seed, model=model)
    files = [directory / f"iteration_{i}" / "evaluation.json" for i in range(config.iterations + 1)]
    if not files[-1].exists():
        if report:
            return None
        from isheep_jax.loop.iteration import run
        from isheep_jax.runtime import JaxBackend, evaluators, held_out_instructions

        run(config, JaxBackend(config), evaluators(config), held_out_instructions(config), _Quiet())
    return [json.loads(file.read_text())["tiny"] for file in files]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m isheep_jax.tiny.study",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/study"), help="directory of the runs")
    parser.add_argument("--base", type=Path, nargs="+", default=[CHECKPOINT], help="base models (directories)")
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="seeds of the loop")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), help="what to run")
    parser.add_argument("--split", choices=SPLITS, default="development", help="which held-out prompts")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts (count)")
    parser.add_argument("--report", action="store_true", help="run nothing: report the runs that are there")
    parser.add_argument("--results", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--figure", type=Path, help="also draw the rise into this SVG file")
    options = parser.parse_args(arguments)
    tiny = named_config("tiny")
    evaluate = dataclasses.replace(tiny.evaluate, split=options.split, prompts=options.prompts)
    config = dataclasses.replace(tiny, workdir=str(options.workdir), evaluate=evaluate)
    results: study_table.Results = {}
    for base in options.base:
        for variant in options.variants:
            for seed in options.seeds:
                rows = run_variant(config, base, variant, seed, options.report)
                if rows is None:
                    continue
                print(f"{base.name} {variant} {seed}: {study_table.line(rows)}", flush=True)
                results.setdefault(base.name, {}).setdefault(variant, {})[seed] = rows
    print("\n" + study_table.table(results, {name: title for name, (title, _) in VARIANTS.items()}))
    if options.results:
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    if options.figure:
        options.figure.write_text(study_table.figure(results))


if __name__ == "__main__":
    sys.exit(run_command(main, "isheep_jax.tiny.study"))
