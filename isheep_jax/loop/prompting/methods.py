"""The methods of `synthesize.method` and `respond.method`, an entry each: prompts, checks, text for the card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isheep_jax.config import Config
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.prompting.few_shot import FewShot
from isheep_jax.loop.prompting.principles import Principles
from isheep_jax.loop.prompting.protocols import PromptSource, ResponsePrompts
from isheep_jax.loop.prompting.shown import seed_pool
from isheep_jax.loop.prompting.similar import (
    Neighbors,
    SimilarPairs,
    SimilarPairsForResponses,
    check_template,
    choose_examples,
)
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.prompting.topics import Topics, Type, brainstorm, hints, read_types
from isheep_jax.loop.prompting.ways import ways_of
from isheep_jax.loop.prompting.zero_shot import ZeroShot
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction
from isheep_jax.text.conversation import Prompt


def _no_check(templates: Templates) -> None:
    """Checks nothing: the method has no files of its own."""


@dataclass(frozen=True)
class SynthesizeMethod:
    """A method of writing instructions.

    sources: makes its sources of prompts, which are used one after the other; the last one has no limit. It may run
    stages of its own. The last argument is the pool of similar pairs, if a method needs it.
    describe: what the model card says after "written by ...".
    check: raises UserError where its templates, or the files next to them, are malformed; called before a run begins.
    shots: number of seed tasks that there must be at least.
    """

    sources: Callable[[StageContext, Model, Neighbors | None], list[PromptSource]]
    describe: Callable[[Config], str]
    check: Callable[[Templates], object] = _no_check
    shots: Callable[[Config], int] = lambda config: max(way.shots for way in ways_of(config.synthesize))


@dataclass(frozen=True)
class RespondMethod:
    """A method of writing responses.

    prompts: makes the prompts for instructions; its further arguments are the zero-shot prompts by the instruction's id
    and the pool of similar pairs, if a method needs it. describe, check: as in `SynthesizeMethod`.
    """

    prompts: Callable[
        [StageContext, Model, Sequence[Instruction], Mapping[str, Prompt], Neighbors | None], ResponsePrompts
    ]
    describe: Callable[[Config], str]
    check: Callable[[Templates], object] = _no_check


def _few_shot(context: StageContext, writer: Model, neighbors: Neighbors | None) -> list[PromptSource]:
    return [FewShot(context, seed_pool(context, writer))]


def _types(templates: Templates) -> list[Type]:
    return read_types(templates.directory / "topics.jsonl")


def _topics(context: StageContext, writer: Model, neighbors: Neighbors | None) -> list[PromptSource]:
    types = _types(context.templates)
    topics = Topics(context, types, hints(types, brainstorm(context, writer, types)))
    return [topics, FewShot(context, seed_pool(context, writer))]


def _similar(context: StageContext, writer: Model, neighbors: Neighbors) -> list[PromptSource]:
    return [SimilarPairs(context, neighbors)]


def _similar_responses(
    context: StageContext,
    writer: Model,
    instructions: Sequence[Instruction],
    prompts: Mapping[str, Prompt],
    neighbors: Neighbors,
) -> ResponsePrompts:
    shown = choose_examples(context, writer, neighbors, instructions)
    return SimilarPairsForResponses(context.templates, neighbors, shown)


def _shown_pairs(config: Config) -> str:
    return f"{config.retrieval.examples} {'similar' if config.retrieval.choose == 'nearest' else 'random'} pairs"


SYNTHESIZE_METHODS: dict[str, SynthesizeMethod] = {
    "few_shot": SynthesizeMethod(_few_shot, describe=lambda config: ""),
    "topics": SynthesizeMethod(
        _topics,
        describe=lambda config: f", {config.synthesize.topic_share:.0%} of them about topics of its own",
        check=_types,
    ),
    "retrieved": SynthesizeMethod(
        _similar,
        describe=lambda config: f", each after {_shown_pairs(config)}",
        check=check_template,
        shots=lambda config: 1,
    ),
}

RESPOND_METHODS: dict[str, RespondMethod] = {
    "zero_shot": RespondMethod(
        lambda context, writer, instructions, prompts, neighbors: ZeroShot(context, prompts),
        describe=lambda config: "",
    ),
    "principles": RespondMethod(
        lambda context, writer, instructions, prompts, neighbors: Principles(context.templates),
        describe=lambda config: " after rules of good answers, which are not trained on",
        check=Principles,
    ),
    "retrieved": RespondMethod(
        _similar_responses,
        describe=lambda config: f" after {_shown_pairs(config)}, which are not trained on",
        check=check_template,
    ),
}
