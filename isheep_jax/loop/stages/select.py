"""Selects the pairs that the model learns from, and writes them as a dataset."""

from collections.abc import Sequence

from isheep_jax.loop.context import StageContext
from isheep_jax.loop.dataset import write_dataset
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Pair, Scores, Selected, kept
from isheep_jax.loop.selection.rules import hint
from isheep_jax.loop.selection.select import select
from isheep_jax.loop.stages.measure import measure

_DATASET = "dataset"


def select_pairs(
    context: StageContext,
    judge: Model,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
) -> list[Selected]:
    """Returns the last verdict on every pair; kept ones are also in the stage's `dataset/`.

    judge: the model that measures what the rule needs besides readings.
    pairs: all pairs, in the order of generation, dropped ones included.
    scores: of the kept pairs.
    Raises NothingLeftError when too few pairs are kept; nothing is written then, so that the run resumes here with
    other settings of selection.
    """
    if context.is_done("selected"):
        return _finished(context)
    config = context.config
    clusters = measure(context, judge, kept(pairs))
    with context.open("selected", len(pairs)) as stage:
        selected = select(config, context.iteration, pairs, scores, clusters, context.turn)
        if context.turn == 1:
            share = len(kept(selected)) / config.synthesize.instructions
            reasons = "the reasons for the others are in responses/"
            context.guard("min_yield", share, hint=hint(config) or reasons, fresh=True)
        stage.parts.clear()  # one that an interrupted run left is written again
        stage.write_part(selected)
        # The library makes no dataset of nothing, which a second turn may come to.
        if kept(selected):
            write_dataset(stage.files.directory / _DATASET, kept(selected))
            stage.beside = _DATASET
        # What the paper's rule, all sampled scores above the threshold, would keep on average.
        chances = [s.above for s in selected if s.above is not None]
        if chances:
            stage.summary["expected_above_threshold"] = round(sum(chances), 2)
        stage.advance(len(pairs), kept=len(kept(selected)))
    return selected


def _finished(context: StageContext) -> list[Selected]:
    """Returns the records of the finished stage; a dataset that is damaged is written again from them."""
    files = context.files("selected")
    selected = files.records()
    if not files.is_whole(_DATASET):
        context.reporter.warn(f"{files.directory / _DATASET} was damaged; it is written again")
        write_dataset(files.directory / _DATASET, kept(selected))
    return selected
