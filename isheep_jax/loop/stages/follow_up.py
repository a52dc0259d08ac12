"""A second turn: the model writes what a user might say next to a kept pair, and answers that.

The paper trains on single turns only and sees the second turns of MT-Bench fall with the iterations (section 5.1).
"""

from collections.abc import Sequence

from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.filters.held_out import is_held_out
from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.filters.text_rules import instruction_reason
from isheep_jax.loop.filters.verdicts import IN_EVALUATION_SET, cut_reason, verdict_of
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction, Selected, user_text
from isheep_jax.text.conversation import Conversation, Message

# Strings that end a user message: the end of the paragraph, the label of the next message, another task.
STOP = ("\n\n", "\nAssistant:", "\nPerson:", "\n###")


def write_follow_ups(context: StageContext, writer: Model, pairs: Sequence[Selected]) -> list[Instruction]:
    """Returns one instruction to follow each of the (kept) pairs, dropped ones included; its `seeds` name the pair."""
    settings, templates = context.config.synthesize, context.templates
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.max_tokens, STOP)
    with context.open("follow_ups", len(pairs)) as stage:
        for block in stage.blocks(list(enumerate(pairs)), whole=True):
            requests = [
                Request(
                    context.request_id("follow_up", x.id),
                    templates.render("follow_up", instruction=x.instruction, input=x.input, response=x.response),
                    templates.prefix("follow_up"),
                )
                for _, x in block
            ]
            for i, completion in by_request(requests, writer.generate(requests, sampling)):
                number, pair = block[i]
                text = completion.text.strip()
                verdict = verdict_of(completion, _reason(context, text, pair) or cut_reason(completion, "", text))
                stage.put(i, Instruction(f"{pair.id}.2", text, "", number, (pair.id,), verdict))
    return stage.records


def _reason(context: StageContext, text: str, pair: Selected) -> str | None:
    """Returns why a follow-up to a pair is dropped, or None."""
    if normalize(text) == normalize(pair.instruction):
        return "repeats the first turn"
    if is_held_out(text, "", context.held_out):
        return IN_EVALUATION_SET
    return instruction_reason(context.config.synthesize.rules, text, "")


def first_turn(pair: Selected) -> Conversation:
    """Returns the first turn as a conversation."""
    user = Message("user", user_text(pair.instruction, pair.input))
    return (user, Message("assistant", pair.response))
