"""The command that says whether a config fits its hardware, what limits it, and what an iteration costs.

python -m isheep_jax.plan --config=NAME
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.cli.output import show
from isheep_jax.errors import UserError
from isheep_jax.files import check_output, write_json
from isheep_jax.text_files import read_object


@dataclass(frozen=True)
class PlanOptions(ConfigOptions):
    """Options of the command."""

    output: str = ""
    """JSON file to write the plan to, too."""
    fit: bool = False
    """Search the largest decode.slots and sft.batch_size that fit, and the least remat."""
    gpu: str = ""
    """Plan for one GPU that is not here (A100, H100 or H200), by arithmetic alone: nothing is compiled."""
    shape: str = ""
    """Tokens of a prompt and of its completion, such as 1800/128: print the requests per second, too."""
    table: tuple[str, ...] = ()
    """Plan nothing: print plans that --output wrote as a Markdown table."""


COMMAND = Command(
    module="isheep_jax.plan",
    options=PlanOptions,
    usage=(
        "--config=NAME [--preset=NAME] [--output=FILE] [--fit | --gpu=NAME] [--shape=PROMPT/NEW] "
        "[--section.field=value ...]",
        "--table FILE...",
    ),
    about="Compiles the programs of an iteration for the config's hardware (a TPU slice is compiled for without a TPU) "
    "and prints memory per chip, collectives, and the times of steps and of an iteration: the bound that peaks allow, "
    "and a forecast. Exit code 1: it does not fit.",
    example="--config=tiny",
    instead_of_config="table",
)


def main(arguments: Sequence[str]) -> None:
    """Plans a config. Raises `UserError` for bad input, and exits with 1 when a program does not fit."""
    options = COMMAND.parse(arguments)
    if not options.config:
        return _print_table(options.table)
    config = options.settings
    output = check_output("--output", options.output) if options.output else None

    # Imported here, after the environment is set that jax reads at its first import.
    from isheep_jax.planning.hardware import gpu_chip, parse_topology, prepare_environment

    if options.gpu:
        gpu_chip(options.gpu)
        if config.mesh.topology or options.fit:
            raise UserError("--gpu: goes neither with --mesh.topology nor with --fit, which need a compiler")
        os.environ["JAX_PLATFORMS"] = "cpu"
    if config.mesh.topology:
        parse_topology(config.mesh.topology)
    prepare_environment(config.mesh.topology)
    from isheep_jax.planning import fit, report, serving
    from isheep_jax.planning.models import planned_architecture
    from isheep_jax.planning.plan import as_dict, find_hardware, make_plan, plan_throughput
    from isheep_jax.runtime.devices import default_backend

    shape = serving.parse_shape(options.shape, config) if options.shape else None
    if not config.mesh.topology:
        default_backend()  # says what is wrong where there are no devices
    with tempfile.TemporaryDirectory() as work:
        architecture = planned_architecture(config.model.path, Path(work))
    hardware = find_hardware(config, options.gpu)
    if shape and not hardware.chip:
        raise UserError("--shape: the peaks of these devices are not known; give --mesh.topology or --gpu")
    fitted: dict[str, list[str]] = {}
    if options.fit:
        before = config
        config = fit.fit(config, architecture, hardware, _note_attempt)
        fitted = {"fit": fit.changes(before, config)}
        show(f"the largest that fits: {' '.join(fitted['fit']) or 'the config as it is'}\n")
    work = "adding up" if options.gpu else "compiling"
    plan = make_plan(config, architecture, hardware, on_program=lambda name: _note(f"{work} {name} ..."))
    show("\n".join(report.lines(plan)))
    result = as_dict(plan) | fitted
    if shape:
        throughput = plan_throughput(plan, shape)
        show("\n" + "\n".join(report.throughput_lines(throughput, len(hardware.devices))))
        result["requests_per_second"] = throughput.as_dict()
    if output:
        write_json(output, result)
    if not plan.fits:
        sys.exit(1)


def _print_table(names: Sequence[str]) -> None:
    from isheep_jax.planning import report

    if not names:
        raise UserError("--table needs files that --output wrote: --table a.json b.json")
    plans = [read_object(name, "--table", "what --output writes") for name in names]
    for name, plan in zip(names, plans, strict=True):
        try:
            report.table([plan])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"--table: {name} is not a file that --output wrote") from None
    show("\n".join(report.table(plans)))


def _note_attempt(program: str, setting: str, fits: bool) -> None:
    _note(f"{setting}: {program} {'fits' if fits else 'does not fit'}")


def _note(line: str) -> None:
    show(line, stream=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
