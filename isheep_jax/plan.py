"""Whether a config fits its hardware, what limits it, and what an iteration costs, before any of it is rented.

python -m isheep_jax.plan --config=NAME
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from isheep_jax.cli.arguments import parse_config, run_command
from isheep_jax.errors import UserError

MODULE = "isheep_jax.plan"
USAGE = """python -m isheep_jax.plan --config=NAME [--preset=NAME] [--output=FILE] [--fit] [--section.field=value ...]
python -m isheep_jax.plan --table FILE...

Compiles the programs of an iteration for the config's hardware (a TPU slice is compiled for without a TPU) and prints
memory per chip, collectives, least possible times and the cost of an iteration. Exit code 1: it does not fit.

--output=FILE  write the plan as JSON too
--fit          search the largest decode.slots and sft.batch_size that fit, and the least remat
--table        print plans that --output wrote as a table in Markdown
"""


def main(arguments: Sequence[str]) -> None:
    """Plans a config. Raises `UserError` for bad input, and exits with 1 when a program does not fit."""
    if any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
    elif "--table" in arguments:
        return _print_table([a for a in arguments if a != "--table"])
    output, searching, rest = _own_options(arguments)
    if output and not output.parent.is_dir():
        raise UserError(f"--output: there is no directory {output.parent}")
    config = parse_config(rest, MODULE)

    # Imported here, after the environment is set that jax reads at its first import.
    from isheep_jax.planning.hardware import parse_topology, prepare_environment

    if config.mesh.topology:
        parse_topology(config.mesh.topology)
    prepare_environment(config.mesh.topology)
    from isheep_jax.planning import fit, report
    from isheep_jax.planning.models import planned_architecture
    from isheep_jax.planning.plan import as_dict, find_hardware, make_plan

    with tempfile.TemporaryDirectory() as work:
        architecture = planned_architecture(config.model.path, Path(work))
    hardware = find_hardware(config)
    found = {}
    if searching:
        before = config
        config = fit.fit(config, architecture, hardware, _tell_attempt)
        found = {"fit": fit.changes(before, config)}
        print(f"the largest that fits: {' '.join(found['fit']) or 'the config as it is'}\n")
    plan = make_plan(config, architecture, hardware, on_program=lambda name: _tell(f"compiling {name} ..."))
    print("\n".join(report.lines(plan)))
    if output:
        output.write_text(json.dumps(as_dict(plan) | found, indent=2) + "\n")
    if not plan.fits:
        sys.exit(1)


def _print_table(names: list[str]) -> None:
    from isheep_jax.planning import programs, report

    if not names:
        raise UserError("--table needs files that --output wrote: --table a.json b.json")
    plans = []
    for name in names:
        try:
            plans.append(json.loads(Path(name).read_text()))
            if set(plans[-1]["programs"]) != set(programs.NAMES) or not plans[-1]["settings"]:
                raise ValueError
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"--table: {name} is not a file that --output wrote") from None
    print("\n".join(report.table(plans)))


def _own_options(arguments: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """(--output, --fit, the arguments that are the config's)."""
    output, searching, rest = None, False, []
    words = iter(arguments)
    for word in words:
        if word == "--fit":
            searching = True
        elif word == "--output" or word.startswith("--output="):
            name = word.partition("=")[2] or (next(words, "") if word == "--output" else "")
            if not name:
                raise UserError("--output needs a file: --output=plan.json")
            output = Path(name)
        else:
            rest.append(word)
    return output, searching, rest


def _tell_attempt(program: str, setting: str, fits: bool) -> None:
    _tell(f"{setting}: {program} {'fits' if fits else 'does not fit'}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
