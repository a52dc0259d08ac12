"""The methods of `synthesize.method` and `respond.method`, one entry each: templates, prompts, words for the card."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from isheep_jax.config import Config
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.prompting.few_shot import FewShot
from isheep_jax.loop.prompting.principles import Principles
from isheep_jax.loop.prompting.protocols import PromptSource, ResponsePrompts
from isheep_jax.loop.prompting.similar import Neighbors, SimilarPairs, SimilarPairsForResponses, choose_examples
from isheep_jax.loop.prompting.topics import Topics, brainstorm, hints, read_types
from isheep_jax.loop.prompting.zero_shot import ZeroShot
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction
from isheep_jax.text.conversation import Prompt


@dataclass(frozen=True)
class SynthesizeMethod:
    """A method of writing instructions.

    sources: makes its sources of prompts, which are used one after the other; the last one has no limit. It may run
    stages of its own. The last argument is the pool of similar pairs, if a method needs it.
    describe: what the model card says after "written by ...".
    templates: names of the templates that it needs besides `synthesize`.
    """

    sources: Callable[[StageContext, Model, Neighbors | None], list[PromptSource]]
    describe: Callable[[Config], str]
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class RespondMethod:
    """A method of writing responses.

    prompts: makes the prompts for instructions; its further arguments are the zero-shot prompts by the instruction's id
    and the pool of similar pairs, if a method needs it. describe, templates: as in `SynthesizeMethod`.
    """

    prompts: Callable[
        [StageContext, Model, Sequence[Instruction], Mapping[str, Prompt], Neighbors | None], ResponsePrompts
    ]
    describe: Callable[[Config], str]
    templates: tuple[str, ...] = ()


def _few_shot(context: StageContext, writer: Model, neighbors: Neighbors | None) -> list[PromptSource]:
    return [FewShot(context)]


def _topics(context: StageContext, writer: Model, neighbors: Neighbors | None) -> list[PromptSource]:
    types = read_types(context.templates.topics_file)
    return [Topics(context, types, hints(types, brainstorm(context, writer, types))), FewShot(context)]


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
        templates=("topics", "guided"),
    ),
    "retrieved": SynthesizeMethod(
        _similar, describe=lambda config: f", each after {_shown_pairs(config)}", templates=("retrieved",)
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
        templates=("principles",),
    ),
    "retrieved": RespondMethod(
        _similar_responses,
        describe=lambda config: f" after {_shown_pairs(config)}, which are not trained on",
        templates=("retrieved",),
    ),
}


def templates_of(config: Config) -> tuple[str, ...]:
    """Returns the names of the templates that the methods of a config need."""
    methods = SYNTHESIZE_METHODS[config.synthesize.method], RESPOND_METHODS[config.respond.method]
    return tuple(dict.fromkeys(name for method in methods for name in method.templates))
