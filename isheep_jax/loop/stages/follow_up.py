"""A second turn: the model writes what a user might say next to a kept pair, and answers that.

The paper trains on single turns only and sees the second turns of MT-Bench fall with the iterations (section 5.1).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from isheep_jax.config import Config
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.loop.filters.novelty import normalize
from isheep_jax.loop.filters.text_rules import instruction_reason
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.loop.records import KEPT, Instruction, Pair, Selected, dropped, user_text
from isheep_jax.loop.run_directory import Stage
from isheep_jax.loop.stages.synthesize import counts
from isheep_jax.text.conversation import Conversation, Message

# A message of the user ends with its paragraph, or where the model goes on with the other's part or another task.
STOP = ("\n\n", "\nAssistant:", "\nPerson:", "\n###")


def follow_ups(
    model: Model,
    config: Config,
    templates: Templates,
    pairs: Sequence[Selected],
    held_out: frozenset[str],
    stage: Stage[Instruction],
    iteration: int,
    progress: StageReporter,
) -> list[Instruction]:
    """One instruction to follow each of the (kept) pairs, dropped ones included; its `seeds` name the pair.

    held_out: normalized instructions of evaluation sets.
    """
    settings = config.synthesize
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.max_tokens, STOP)

    def process(block: Sequence[tuple[int, Selected]]) -> Iterator[tuple[int, Instruction]]:
        requests = [
            Request(
                f"{iteration}/follow_up/{x.id}",
                templates.follow_up(x.instruction, x.input, x.response),
                templates.prefix("follow_up"),
            )
            for _, x in block
        ]
        index = {request.id: i for i, request in enumerate(requests)}
        for completion in model.generate(requests, sampling):
            i = index[completion.id]
            number, pair = block[i]
            text = completion.text.strip()
            if completion.finish_reason == "error":
                verdict = dropped("not decoded", completion.error)
            elif completion.finish_reason == "length":
                verdict = dropped("unfinished")
            elif normalize(text) == normalize(pair.instruction):
                verdict = dropped("repeats the first turn")
            elif normalize(text) in held_out:
                verdict = dropped("in an evaluation set")
            else:
                reason = instruction_reason(settings.rules, text, "")
                verdict = dropped(reason) if reason else KEPT
            yield i, Instruction(f"{pair.id}.2", text, "", number, (pair.id,), verdict)

    records = stage.work(list(enumerate(pairs)), process, progress.advance)
    stage.finish(counts(records))
    return records


def conversation(first: Selected) -> Conversation:
    """The first turn."""
    user = Message("user", user_text(first.instruction, first.input))
    return (user, Message("assistant", first.response))


def as_assessed(pairs: Sequence[Pair], firsts: Mapping[str, Selected]) -> list[Pair]:
    """The pairs of second turns with the first turn in front of their instruction, for prompts that show one pair.

    firsts: the first turns, by the id of the instruction that follows them.
    """

    def whole(pair: Pair) -> str:
        first = firsts[pair.instruction_id]
        said = user_text(first.instruction, first.input)
        return f"{said}\n\nResponse: {first.response}\n\nInstruction: {pair.instruction}"

    return [dataclasses.replace(pair, instruction=whole(pair)) for pair in pairs]
