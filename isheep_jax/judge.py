"""The command that checks a judge: whether each reading tells good responses from damaged ones.

python -m isheep_jax.judge --config=NAME [--judge=MODEL] [--readings=all]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import report_error, run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.config import OWN_JUDGES, Config, is_server
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError
from isheep_jax.files import check_output

if TYPE_CHECKING:
    from etils import epath

    from isheep_jax.loop.protocols import Model
    from isheep_jax.loop.records import Checked


@dataclass(frozen=True)
class JudgeOptions(ConfigOptions):
    """Options of the command."""

    judge: str = ""
    """Model to check, as in assess.judge. Empty: the config's."""
    readings: tuple[str, ...] = ()
    """Readings to check, as in assess.readings. 'all': every one that the judge allows. Empty: the config's."""
    pairs: str = ""
    """File of pairs of known order, as in guard.pairs. Empty: the config's, or the seeds' outputs and damaged ones."""
    limit: int = 0
    """Most tasks to use (count), evenly spaced. 0: 16 of the seeds, or all of a file of pairs."""
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
    "AUC by kind of damage, ties, bias by length, agreement between readings; where it fails, what would do, and exit "
    "code 1. A run does the same before it pays for anything (guard.judge).",
    example="--config=tiny",
    instead_of_config="model.path",
    ranges={"limit": "[0, inf)"},
)


def main(arguments: Sequence[str]) -> None:
    """Checks the judge of a config, and exits with 1 when it fails.

    Raises `UserError` for bad input, before a model is loaded.
    """
    options = COMMAND.parse(arguments)
    config = _config(options)
    check_values(config)
    output = check_output("--output", options.output) if options.output else None
    from isheep_jax.loop.judging.check import MIN_TASKS

    if 0 < options.limit < MIN_TASKS:
        raise UserError(f"--limit: a check needs at least {MIN_TASKS} tasks, or 0 for the usual number")

    # Imported here so that --help and misspelled settings answer at once: these bring in jax.
    from isheep_jax import distributed

    with distributed.distributed_session(lambda error: report_error(error, COMMAND.module, arguments)):
        passes = _run(config, options.limit, output)
    if not passes:
        sys.exit(1)


def _config(options: JudgeOptions) -> Config:
    """Returns the config with what the options change of it."""
    from isheep_jax.loop.judging.check import checkable
    from isheep_jax.loop.judging.readings import READINGS

    assess, guard = options.settings.assess, options.settings.guard
    assess = replace(assess, judge=options.judge or assess.judge)
    possible = checkable(is_server(assess.judge))
    names = options.readings or assess.readings
    if names == ("all",):
        names = possible
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--readings: {name!r} is there twice")
        if name not in possible:
            why = "cannot be checked" if name in READINGS else "is no reading"
            where = " with a server" if name in checkable(False) else ""
            raise UserError(f"--readings: {name!r} {why}{where}; use some of {', '.join(possible)}")
    if not names:
        raise UserError("--readings: the config has none; name some, or 'all'")
    guard, select = replace(guard, pairs=options.pairs or guard.pairs), options.settings.select
    if tuple(names) != assess.readings:
        # What the config says of its own readings alone does not hold for these.
        ranking = "sum" if select.ranking == "probability" else select.ranking
        weights = select.weights if len(select.weights) == len(names) else ()
        select = replace(select, weights=weights, ranking=ranking, consistency=(0.0, 1.0))
    return replace(options.settings, assess=replace(assess, readings=tuple(names)), select=select, guard=guard)


def _run(config: Config, limit: int, output: "epath.Path | None") -> bool:
    """Prints the table and returns whether the judge passes."""
    from isheep_jax import distributed
    from isheep_jax.cli.console import Console
    from isheep_jax.cli.judge_table import judge_lines
    from isheep_jax.files import write_json
    from isheep_jax.loop.inputs import read_inputs
    from isheep_jax.loop.judging.advice import advice
    from isheep_jax.loop.judging.check import check, known_pairs, result_of
    from isheep_jax.loop.judging.judges import framing_of
    from isheep_jax.loop.judging.reader import Reader
    from isheep_jax.loop.judging.unread import Unread
    from isheep_jax.loop.prompting.templates import load as load_templates
    from isheep_jax.loop.stages.table import templates_of
    from isheep_jax.runtime.locate import locate_judge

    directory = locate_judge(config)
    inputs = read_inputs(config, directory)
    pairs = known_pairs(config, inputs.seeds, inputs.templates, limit)
    judge = config.assess.judge
    # An iteration's own models do not exist yet: what is checked is the judge of the first one.
    framing = framing_of(config, judge, 1)
    bare = config.respond.base_prompt == "bare"
    model = _model(config, directory)
    with Console(None) as console:

        def read(config: Config) -> "list[Checked]":
            templates = load_templates(config.prompts, templates_of(config))
            reader = Reader(config.assess, templates, model, framing, "check")
            records = {}
            unread = Unread(console.note, server=is_server(config.assess.judge))
            with console.progress(f"judge {_name(config)}", len(pairs), "pairs") as progress:
                for i, record in check(reader, pairs, bare=bare):
                    unread.take(record.scores)
                    records[i] = record
                    progress.advance()
                unread.end()
            return [records[i] for i in sorted(records)]

        if not is_server(judge):
            template = "auto" if directory else config.model.chat_template
            way = "bare text" if bare else f"a conversation (template {template})"
            console.note(f"responses are read after {way}, in {config.model.compute_dtype}")
        result = result_of(config, read(config))
        for line in judge_lines(result, config.guard):
            console.note(line)
        passes = result.selection.passes(config.guard)
        if output:
            distributed.from_primary(lambda: write_json(output, result.as_dict()))
        if not passes:
            console.note("the other readings are tried")
            console.note(advice(config, read))
    return passes


def _name(config: Config) -> str:
    return config.model.path if config.assess.judge in OWN_JUDGES else config.assess.judge


def _model(config: Config, directory: "epath.Path | None") -> "Model":
    """Returns the judge: a server, the model in the directory, or the base model."""
    from isheep_jax.loop.models import server_of
    from isheep_jax.runtime.locate import locate_model
    from isheep_jax.runtime.subjects import Decoding, OneModel

    if is_server(config.assess.judge):
        return server_of(config, config.assess.judge, goes_on=False)
    model = config.model
    decoding = Decoding(model.chat_template, model.compute_dtype, config.seed, config.mesh.decode_tensor, config.decode)
    return OneModel(decoding).load(
        directory or locate_model(model.path, "--model.path"), "auto" if directory else model.chat_template
    )


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
