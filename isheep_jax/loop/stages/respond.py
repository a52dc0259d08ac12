"""Writes responses to the instructions, then applies the rules for responses (I-SHEEP sections 3.1 and 3.2)."""

from collections import Counter
from collections.abc import Sequence

from isheep_jax.decode.requests import Completion, SamplingParams
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.filters.text_rules import clean_response, response_reason
from isheep_jax.loop.filters.verdicts import cut_reason, verdict_of
from isheep_jax.loop.prompting.protocols import ResponsePrompts
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction, Pair, user_text


def respond(
    context: StageContext, writer: Model, instructions: Sequence[Instruction], prompts: ResponsePrompts
) -> list[Pair]:
    """Returns `respond.samples` responses to each of the (kept) instructions, dropped ones included."""
    settings = context.config.respond
    sampling = SamplingParams(
        temperature=settings.temperature[min(context.iteration, len(settings.temperature)) - 1],
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop=prompts.stop,
    )
    items = [(instruction, sample) for instruction in instructions for sample in range(settings.samples)]
    with context.open("responses", len(items)) as stage:
        for block in stage.blocks(items, whole=True):
            requests = [prompts.request(context.request_id("respond", x.id, sample), x) for x, sample in block]
            for i, completion in by_request(requests, writer.generate(requests, sampling)):
                stage.put(i, _pair(settings.rules, *block[i], completion, prompts))
        reasons = Counter(pair.verdict.reason for pair in stage.records if not pair.verdict.kept)
        if reasons and stage.fresh:
            most = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
            stage.advance(0, dropped=f"{reasons.total()}: {most}")
    return stage.records


def _pair(rules: str, instruction: Instruction, sample: int, completion: Completion, prompts: ResponsePrompts) -> Pair:
    parsed = prompts.parse(completion.text, instruction)
    text = clean_response(rules, parsed.text)
    task = user_text(instruction.instruction, instruction.input)
    reason = parsed.reason or response_reason(rules, instruction.instruction, instruction.input, text)
    return Pair(
        f"{instruction.id}-{sample}",
        instruction.id,
        instruction.instruction,
        instruction.input,
        text,
        verdict_of(completion, reason or cut_reason(completion, task, text)),
        parsed.thoughts,
        completion.stop or None,
    )
