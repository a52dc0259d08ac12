"""The command that checks a judge: whether each reading tells good responses from damaged ones.

python -m isheep_jax.judge --config=NAME [--judge=MODEL] [--readings=all]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import report_error, run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.config import OWN_JUDGES, Config, is_server
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from isheep_jax.loop.protocols import Model


@dataclass(frozen=True)
class JudgeOptions(ConfigOptions):
    """Options of the command."""

    judge: str = ""
    """Model to check, as in assess.judge. Empty: the config's."""
    readings: tuple[str, ...] = ()
    """Readings to check, as in assess.readings. 'all': every one that the judge allows. Empty: the config's."""
    pairs: str = ""
    """File of pairs of known order, as in guard.pairs. Empty: the config's, or the seeds' outputs and damaged ones."""
    limit: int = 16
    """Tasks to use (count; 0: all), evenly spaced."""
    output: str = ""
    """JSON file to write the table to, too."""


COMMAND = Command(
    module="isheep_jax.judge",
    options=JudgeOptions,
    usage=(
        "--config=NAME [--judge=MODEL] [--readings=all] [--pairs=FILE] [--limit=N] [--section.field=value ...]",
        "--model.path=MODEL [--readings=all] ...",
    ),
    about="Checks whether a judge tells good responses from damaged ones, reading by reading, and prints a table: the "
    "AUC by kind of damage, ties, bias by length, agreement between readings. A run does the same before it pays for "
    "anything (guard.judge).",
    example="--config=tiny",
    instead_of_config="model.path",
    ranges={"limit": "[0, inf)"},
)


def main(arguments: Sequence[str]) -> None:
    """Checks the judge of a config. Raises `UserError` for bad input, before a model is loaded."""
    options = COMMAND.parse(arguments)
    config = _config(options)
    check_values(config)
    output = Path(options.output) if options.output else None
    if output and not output.parent.is_dir():
        raise UserError(f"--output: there is no directory {output.parent}")

    # Imported here so that --help and misspelled settings answer at once: these bring in jax.
    from isheep_jax import distributed

    with distributed.distributed_session(lambda error: report_error(error, COMMAND.module, arguments)):
        _run(config, options.limit, output)


def _config(options: JudgeOptions) -> Config:
    """Returns the config with what the options change of it."""
    from isheep_jax.loop.judging.check import checkable

    assess, guard = options.settings.assess, options.settings.guard
    assess = replace(assess, judge=options.judge or assess.judge)
    possible = checkable(is_server(assess.judge))
    names = options.readings or assess.readings
    if names == ("all",):
        names = possible
    for name in names:
        if name not in possible:
            raise UserError(
                f"--readings: {name!r} cannot be checked with this judge; use some of {', '.join(possible)}"
            )
    if not names:
        raise UserError("--readings: the config has none; name some, or 'all'")
    guard, select = replace(guard, pairs=options.pairs or guard.pairs), options.settings.select
    if tuple(names) != assess.readings:
        # How the config orders pairs is about its own readings.
        select = replace(select, weights=(), ranking="sum", consistency=(0.0, 1.0))
    return replace(options.settings, assess=replace(assess, readings=tuple(names)), select=select, guard=guard)


def _run(config: Config, limit: int, output: Path | None) -> None:
    from isheep_jax import distributed
    from isheep_jax.cli.console import Console
    from isheep_jax.cli.judge_table import judge_lines
    from isheep_jax.files import write_json
    from isheep_jax.loop.inputs import read_inputs
    from isheep_jax.loop.judging.check import check, known_pairs, result_of
    from isheep_jax.loop.judging.judges import framing_of
    from isheep_jax.loop.judging.reader import Reader
    from isheep_jax.runtime.locate import locate_judge

    directory = locate_judge(config)
    inputs = read_inputs(config, directory)
    pairs = known_pairs(config, inputs.seeds, inputs.templates, limit)
    judge = config.assess.judge
    # An iteration's own models do not exist yet: what is checked is the judge of the first one.
    framing = framing_of(config, judge, 1)
    bare = config.respond.base_prompt == "bare"
    reader = Reader(config.assess, inputs.templates, _model(config, directory), framing, "check")
    with Console(None) as console:
        records = {}
        with console.progress(f"judge {_name(config)}", len(pairs), "pairs") as progress:
            for i, record in check(reader, pairs, bare=bare):
                records[i] = record
                progress.advance()
        result = result_of(config, [records[i] for i in sorted(records)])
        for line in judge_lines(result, config.guard):
            console.note(line)
    if output:
        distributed.from_primary(lambda: write_json(output, result.as_dict()))


def _name(config: Config) -> str:
    return config.model.path if config.assess.judge in OWN_JUDGES else config.assess.judge


def _model(config: Config, directory: "epath.Path | None") -> "Model":
    """Returns the judge: a server, the model in the directory, or the base model."""
    from isheep_jax.loop.models import server_of
    from isheep_jax.runtime.locate import locate_model
    from isheep_jax.runtime.subjects import Decoding, OneModel

    if is_server(config.assess.judge):
        return server_of(config, config.assess.judge)
    model = config.model
    decoding = Decoding(model.chat_template, model.compute_dtype, config.seed, config.mesh.decode_tensor, config.decode)
    return OneModel(decoding).load(
        directory or locate_model(model.path, "--model.path"), "auto" if directory else model.chat_template
    )


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
