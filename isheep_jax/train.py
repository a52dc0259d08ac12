"""The whole loop: seeds in, better models out. `python -m isheep_jax.train --config=tiny`; again to resume."""

import sys
from collections.abc import Sequence
from pathlib import Path

from isheep_jax.command import command_line, disk_is_full, parse_config, run_command
from isheep_jax.errors import UserError

MODULE = "isheep_jax.train"


def main(arguments: Sequence[str]) -> None:
    """Runs the config's iterations in its run directory, or goes on with those that are there.

    Raises `UserError` for bad input, before anything is written.
    """
    config = parse_config(arguments, MODULE)

    # Imported here so that --help and misspelt settings answer at once: these bring in jax.
    from isheep_jax.console import Console
    from isheep_jax.loop.iteration import run
    from isheep_jax.runtime import JaxBackend, evaluators, held_out_instructions

    try:
        backend = JaxBackend(config)
        with Console(config.directory) as console:
            console.opening(config, backend.description())
            rows = run(config, backend, evaluators(config), held_out_instructions(config), console)
            console.closing(rows)
    except Exception as error:
        if disk_is_full(error):
            raise UserError(_disk_is_full(config.directory, arguments)) from error
        raise


def _disk_is_full(directory: Path, arguments: Sequence[str]) -> str:
    return (
        f"{directory}: no space left on its disk; free some, and the same command goes on from here: "
        f"{command_line(MODULE, arguments)}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
