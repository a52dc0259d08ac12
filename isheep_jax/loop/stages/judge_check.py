"""Checks the judge on pairs of known order before an iteration pays for anything (guard.judge)."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from operator import itemgetter

from etils import epath

from isheep_jax import distributed
from isheep_jax.config import OWN_JUDGES, Config, is_server
from isheep_jax.errors import NothingLeftError
from isheep_jax.files import read_json_if_there, write_json
from isheep_jax.loop import made_models
from isheep_jax.loop.context import SERVER_PART, StageContext
from isheep_jax.loop.inputs import Inputs
from isheep_jax.loop.judging.advice import advice
from isheep_jax.loop.judging.check import JudgeCheck, KnownPair, check, checkable, known_pairs, result_of
from isheep_jax.loop.judging.damages import TEXTS_FILE
from isheep_jax.loop.judging.judges import framing_of, judging_iteration
from isheep_jax.loop.judging.reader import Reader
from isheep_jax.loop.judging.unread import Unread
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.prompting.zero_shot import is_bare
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Checked
from isheep_jax.loop.run_directory import digest
from isheep_jax.loop.selection.rules import RULES, effective_rule
from isheep_jax.loop.stages.table import templates_of

STAGE = "judge_check"
# In the stage's directory: a digest of what its records depend on. They stand before all other stages, so that the
# settings of the judge may still change after they are written, which is what a judge that fails needs.
_ASKED = "asked.json"


def judge_check(context: StageContext, judge: Model) -> JudgeCheck | None:
    """Returns how well the judge finds the order of known pairs; None where this iteration does not check it.

    It is checked where selection looks at its readings and no earlier iteration had the same judge. One that fails is
    warned of, or raises NothingLeftError, by guard.judge.
    """
    if not is_needed(context.config, context.iteration):
        return None
    config = _checkable_part(context.config)
    pairs = known_pairs(config, context.seeds, context.templates)
    _discard_another(context)
    server = is_server(config.assess.judge)
    unread = Unread(lambda text: context.reporter.warn(f"iteration {context.iteration}: {text}"), server=server)
    with context.open(STAGE, len(pairs), part=SERVER_PART if server else 0) as stage:
        for block in stage.blocks(pairs):
            for i, record in _read(context, config, judge, block):
                unread.take(record.scores)
                stage.put(i, record)
        unread.end()
        result = result_of(config, stage.records)
        stage.summary["auc"] = result.selection.auc.value
    if stage.fresh:
        context.reporter.note(f"iteration {context.iteration}: the judge, {result.line(config.guard)}")
    if not result.selection.passes(config.guard):
        _refuse(context, config, judge, pairs, result, fresh=stage.fresh)
    return result


def read_material(config: Config, inputs: Inputs) -> None:
    """Raises UserError where there are no pairs to check a judge with, before a run pays for anything."""
    if is_needed(config, 1):
        known_pairs(config, inputs.seeds, inputs.templates)


def is_needed(config: Config, iteration: int) -> bool:
    """Returns whether an iteration checks its judge."""
    judge = config.assess.judge
    looks = "readings" in RULES[effective_rule(config)].needs
    if config.guard.judge == "off" or not looks or not _checkable_part(config).assess.readings:
        return False
    if iteration == 1 or judge not in OWN_JUDGES:
        return iteration == 1
    return judging_iteration(judge, iteration) != judging_iteration(judge, iteration - 1)


def last_check(context: StageContext) -> JudgeCheck | None:
    """Returns the check of the judge that reads in this iteration, which may be of an earlier one; None without."""
    config = _checkable_part(context.config)
    for number in range(context.iteration, 0, -1):
        files = context.files(STAGE, number)
        if is_needed(context.config, number) and files.done():
            return result_of(config, files.records())
    return None


def _checkable_part(config: Config) -> Config:
    """Returns the config with those readings alone that selection looks at and a check can look at."""
    possible = checkable(is_server(config.assess.judge))
    names, weights = config.assess.readings, config.select.weights
    looked_at = [
        (name, weight)
        for name, weight in zip(names, weights or [1.0] * len(names), strict=True)
        if name in possible and weight > 0
    ]
    return dataclasses.replace(
        config,
        assess=dataclasses.replace(config.assess, readings=tuple(name for name, _ in looked_at)),
        select=dataclasses.replace(config.select, weights=weights and tuple(weight for _, weight in looked_at)),
    )


def _discard_another(context: StageContext) -> None:
    """Removes what a check left that asked something else: with other settings of the judge, or of other pairs."""
    asked = {"digest": _asked(context)}
    directory = context.files(STAGE).directory
    if read_json_if_there(directory / _ASKED) != asked:
        # The summary of a finished iteration tells of the check, and is written again after it.
        summary = context.directory.iteration(context.iteration) / "summary.json"
        distributed.from_primary(lambda: summary.unlink(missing_ok=True))
        distributed.from_primary(lambda: directory.rmtree(missing_ok=True))
        write_json(directory / _ASKED, asked)


def _asked(context: StageContext) -> str:
    files = [context.templates.directory / TEXTS_FILE, epath.Path(context.config.guard.pairs)]
    texts = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files]
    return digest([context.directory.digest("assess"), context.templates.digests(), texts])


def _read(
    context: StageContext, config: Config, judge: Model, pairs: Sequence[KnownPair]
) -> Iterator[tuple[int, Checked]]:
    templates = context.templates
    if config.assess.readings != context.config.assess.readings:
        templates = load(config.prompts, templates_of(config))
    framing = framing_of(config, config.assess.judge, context.iteration)
    reader = Reader(config.assess, templates, judge, framing, context.request_id(STAGE))
    return check(reader, pairs, bare=is_bare(context))


def _refuse(
    context: StageContext,
    config: Config,
    judge: Model,
    pairs: Sequence[KnownPair],
    result: JudgeCheck,
    *,
    fresh: bool,
) -> None:
    """Warns of a judge that failed, or raises NothingLeftError, with the settings that would do.

    An iteration whose model is made goes on with a warning: there is nothing left to be paid for.
    fresh: whether this process has made the check; a user is warned once.
    """
    guard = config.guard
    stops = guard.judge == "stop" and not made_models.read(context.directory.iteration(context.iteration))
    if not stops and not fresh:
        return
    if fresh:
        context.reporter.note(f"iteration {context.iteration}: the judge fails; its other readings are tried")

    def read(other: Config) -> list[Checked]:
        return [record for _, record in sorted(_read(context, other, judge, pairs), key=itemgetter(0))]

    auc = result.selection.auc
    message = (
        f"iteration {context.iteration}: by {result.chosen}, the judge puts a good response above a damaged one with "
        f"AUC {auc} (guard.min_auc {guard.min_auc:g}; 0.5 is a coin){result.selection.losses()}; {advice(config, read)}"
    )
    if stops:
        raise NothingLeftError(f"{message}; with guard.judge=warn the run goes on with it")
    context.reporter.warn(message)
