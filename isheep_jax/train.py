"""The command that runs the loop: `python -m isheep_jax.train --config=tiny`; the same command again resumes.

With several hosts, the same command runs on each of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import disk_is_full, report_error, run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.cli.signals import how_to_go_on
from isheep_jax.config import Config, flatten
from isheep_jax.errors import UserError
from isheep_jax.runtime.stage_profile import check_stage

if TYPE_CHECKING:
    from etils import epath


@dataclass(frozen=True)
class TrainOptions(ConfigOptions):
    """Options of the command."""

    precompile: bool = False
    """Compile the programs of an iteration for these devices, keep them for the next start, and end: of the model its
    config.json and tokenizer are enough."""
    profile: str = ""
    """Stage to profile, such as respond or fine-tune: JAX's profiler traces a few device calls into profile/ of the
    run's directory."""


COMMAND = Command(
    module="isheep_jax.train",
    options=TrainOptions,
    usage=("--config=NAME [--preset=NAME] [--precompile] [--profile=STAGE] [--section.field=value ...]",),
    about="Runs the loop of synthesize, respond, assess, select and fine-tune. The same command again resumes a run.",
    example="--config=tiny",
)

# Names for inputs that are not prompt files, used in error messages.
_INPUTS = {"seeds": "the file of seeds", "assess.judge": "the model of --assess.judge"}


def main(arguments: Sequence[str]) -> None:
    """Runs the config's iterations in its run directory, or resumes them.

    Raises `UserError` for bad input, before anything is written.
    """
    options = COMMAND.parse(arguments)
    config = options.settings
    if options.profile:
        check_stage(options.profile)

    # Imported here so that --help and misspelled settings answer at once: these bring in jax.
    from isheep_jax import distributed

    with distributed.distributed_session(lambda error: report_error(error, COMMAND.module, arguments)):
        if distributed.is_distributed():
            own = {"--precompile": options.precompile, "--profile": options.profile}
            distributed.check_agreement(own | _fingerprint(config))
        try:
            if options.precompile:
                _precompile(config)
            else:
                _run(config, options.profile)
        except Exception as error:
            if disk_is_full(error):
                raise UserError(_disk_is_full(config.directory, arguments)) from error
            raise


def _run(config: Config, profile: str) -> None:
    from isheep_jax.cli.console import Console
    from isheep_jax.directory_lock import owned
    from isheep_jax.runtime.backend import JaxBackend
    from isheep_jax.runtime.run import run
    from isheep_jax.runtime.stage_profile import StageProfiler

    with owned("workdir", config.directory):
        backend = JaxBackend(config)
        with Console(config.directory) as console:
            console.opening(config, backend.description())
            profiler = StageProfiler(console, profile, config.directory) if profile else None
            rows = run(config, profiler or console, backend)
            if profiler:
                profiler.close()
            console.closing(rows)


def _precompile(config: Config) -> None:
    from isheep_jax.cli.console import Console
    from isheep_jax.directory_lock import owned
    from isheep_jax.runtime.backend import JaxBackend
    from isheep_jax.runtime.devices import compilation_cache_directory

    with owned("workdir", config.directory), Console(None) as console:
        backend = JaxBackend(config, weights=False)
        console.note(f"compiling for {backend.description()}")
        result = backend.precompile(lambda name: console.note(f"  {name}"))
        kept = compilation_cache_directory()
        console.note(
            f"{result.programs} programs in {result.seconds:.0f} s: {result.compiled} compiled, {result.cached} found; "
            + (f"kept in {kept}" if kept else "there is no place to keep them")
        )


def _fingerprint(config: Config) -> dict[str, Any]:
    """Returns everything that must be the same on every host, by names that the user knows."""
    from isheep_jax import distributed
    from isheep_jax.loop.inputs import environment, read_inputs
    from isheep_jax.runtime.locate import locate_judge

    inputs = read_inputs(config, locate_judge(config)).digests
    versions = environment()
    return {
        # Hosts may have the directory under different paths; opening it checks that it is the same one.
        **{f"--{name}": value for name, value in flatten(config).items() if name != "workdir"},
        **{_INPUTS.get(name, f"the file {name}"): value for name, value in inputs.items()},
        "the source files of isheep_jax": distributed.code_digest(),
        "the version of python": versions["python"],
        **{f"the version of {package}": version for package, version in versions["packages"].items()},
    }


def _disk_is_full(directory: "epath.Path", arguments: Sequence[str]) -> str:
    return f"{directory}: no space left on its disk; free some, and {how_to_go_on(COMMAND.module, arguments)}"


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
