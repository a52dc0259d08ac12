"""Verbose cloning: the engraved model's thorough answers, for the base model to learn (SELF-ALIGN, section 3.4).

A model that was fine-tuned on answers by principles answers briefly. It is shown the instructions again, with the wish
for a thorough answer; what it writes is learned as the answer to the instruction alone.
"""

import re
from collections.abc import Iterator, Sequence

from isheep_jax.config import Config
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.filters.novelty import normalize
from isheep_jax.loop.filters.text_rules import response_reason
from isheep_jax.loop.prompting.principles import clean, until_repeated
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.loop.records import KEPT, Instruction, Pair, dropped, kept, user_text
from isheep_jax.loop.run_directory import Stage
from isheep_jax.loop.stages.synthesize import counts
from isheep_jax.text.conversation import Message

# Fewer words in a row may well be the same in an answer and in what was asked.
ECHO_WORDS = 6


def thorough_answers(
    model: Model,
    config: Config,
    templates: Templates,
    instructions: Sequence[Instruction],
    stage: Stage[Pair],
    iteration: int,
    progress: StageReporter,
) -> list[Pair]:
    """One thorough answer to each of the (kept) instructions, dropped ones included.

    Raises NothingLeftError when fewer than `select.min_pairs` are kept.
    """
    settings, rules = config.clone, config.respond.rules
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.max_tokens)
    head = templates.prefix("thorough")

    def process(block: Sequence[Instruction]) -> Iterator[tuple[int, Pair]]:
        requests = [
            Request(
                f"{iteration}/clone/{x.id}",
                (Message("user", templates.answer("thorough", x.instruction, x.input)),),
                head,
            )
            for x in block
        ]
        index = {request.id: i for i, request in enumerate(requests)}
        for completion in model.generate(requests, sampling):
            i = index[completion.id]
            x, text = block[i], until_repeated(clean(completion.text))
            if completion.finish_reason == "error":
                verdict = dropped("not decoded", completion.error)
            elif completion.finish_reason == "length":
                verdict = dropped("unfinished")
            else:
                reason = response_reason(rules, x.instruction, x.input, text) or echo_reason(x, head, text)
                verdict = dropped(reason) if reason else KEPT
            yield i, Pair(f"{x.id}-thorough", x.id, x.instruction, x.input, text, verdict)

    pairs = stage.work(instructions, process, progress.advance)
    if len(kept(pairs)) < max(1, config.select.min_pairs):
        raise NothingLeftError(
            f"clone: {len(kept(pairs))} of {len(pairs)} thorough answers are kept, select.min_pairs asks for "
            f"{config.select.min_pairs}; the reasons are in {stage.directory}; in a new run raise clone.max_tokens "
            "or use clone.enabled=False"
        )
    stage.finish(counts(pairs))
    return pairs


def echo_reason(instruction: Instruction, head: str, answer: str) -> str | None:
    """Why an answer is dropped that repeats what the model was shown, or None. head: the wish for a thorough answer."""
    said = f" {normalize(answer)} "
    asked = normalize(user_text(instruction.instruction, instruction.input))
    if len(asked.split()) >= ECHO_WORDS and said.startswith(f" {asked} "):
        return "repeats the instruction"
    for sentence in map(normalize, re.split(r"[.!?\n]+", head)):
        if len(sentence.split()) >= ECHO_WORDS and f" {sentence} " in said:
            return "repeats the prompt"
    return None
