"""Verbose cloning: the engraved model's thorough answers, for the base model to learn (SELF-ALIGN, section 3.4).

A model that was fine-tuned on answers by principles answers briefly. It is shown the instructions again, with the wish
for a thorough answer; what it writes is learned as the answer to the instruction alone.
"""

import re
from collections.abc import Sequence

from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.filters.text_rules import response_reason
from isheep_jax.loop.filters.verdicts import verdict_of
from isheep_jax.loop.prompting.principles import clean, until_repeated
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction, Pair, kept, user_text
from isheep_jax.text.conversation import Message

# Fewest words in a row that count as an echo; shorter ones may be in the prompt and in a good answer.
ECHO_WORDS = 6


def answer_thoroughly(context: StageContext, engraved: Model, instructions: Sequence[Instruction]) -> list[Pair]:
    """Returns one thorough answer to each of the (kept) instructions, dropped ones included.

    Raises NothingLeftError when fewer than `select.min_pairs` are kept.
    """
    config, templates = context.config, context.templates
    sampling = SamplingParams(config.clone.temperature, config.clone.top_p, config.clone.max_tokens)
    prefix = templates.prefix("thorough")
    with context.open("thorough", len(instructions)) as stage:
        for block in stage.blocks(instructions, whole=True):
            requests = [
                Request(
                    context.request_id("clone", x.id),
                    (Message("user", templates.render("thorough", instruction=x.instruction, input=x.input)),),
                    prefix,
                )
                for x in block
            ]
            for i, completion in by_request(requests, engraved.generate(requests, sampling)):
                stage.put(i, _pair(config.respond.rules, block[i], completion, prefix))
        if stage.fresh:
            _check_count(context, stage.records)
    return stage.records


def _pair(rules: str, instruction: Instruction, completion: Completion, prefix: str) -> Pair:
    text = until_repeated(clean(completion.text))
    reason = response_reason(rules, instruction.instruction, instruction.input, text)
    reason = reason or echo_reason(instruction, prefix, text)
    id, verdict = f"{instruction.id}-thorough", verdict_of(completion, reason)
    return Pair(id, instruction.id, instruction.instruction, instruction.input, text, verdict)


def _check_count(context: StageContext, pairs: Sequence[Pair]) -> None:
    least = context.config.select.min_pairs
    if len(kept(pairs)) < max(1, least):
        raise NothingLeftError(
            f"clone: {len(kept(pairs))} of {len(pairs)} thorough answers are kept, select.min_pairs asks for {least}; "
            f"the reasons are in {context.files('thorough').directory}; in a new run raise clone.max_tokens or use "
            "clone.enabled=False"
        )


def echo_reason(instruction: Instruction, prefix: str, answer: str) -> str | None:
    """Returns why an answer that repeats what the model was shown is dropped, or None.

    prefix: the wish for a thorough answer, with which the prompt begins.
    """
    said = f" {normalize(answer)} "
    task = normalize(user_text(instruction.instruction, instruction.input))
    if len(task.split()) >= ECHO_WORDS and said.startswith(f" {task} "):
        return "repeats the instruction"
    for sentence in map(normalize, re.split(r"[.!?\n]+", prefix)):
        if len(sentence.split()) >= ECHO_WORDS and f" {sentence} " in said:
            return "repeats the prompt"
    return None
