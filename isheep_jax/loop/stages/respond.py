"""Writes responses to the instructions: zero-shot (I-SHEEP sections 3.1 and 3.2), by principles or by similar pairs.

The rules for responses then drop what nothing can be learned from.
"""

from collections.abc import Mapping, Sequence

from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters.text_rules import clean_response, response_reason
from isheep_jax.loop.prompting.principles import Principles
from isheep_jax.loop.prompting.similar import Examples
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Instruction, Pair, dropped, user_text
from isheep_jax.text.conversation import Conversation, Message, Prompt

# A base model that is shown a bare instruction goes on with a dialogue of its own: its turns end the response.
BARE_STOP = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "\nUser:",
    "\nHuman:",
    "\nAssistant:",
    "\nQuestion:",
    "\nInstruction:",
    "\n### Instruction",
)


def is_bare(context: StageContext) -> bool:
    """Returns whether responses continue bare text, not a conversation."""
    return context.iteration == 1 and context.config.respond.base_prompt == "bare"


def prompt_for(instruction: str, input: str, *, bare: bool = False, history: Conversation = ()) -> Prompt:
    """Returns what the model is shown of an instruction.

    bare: as text and a line break, to be continued; otherwise as a conversation.
    history: what was said before.
    """
    text = user_text(instruction, input)
    if not bare:
        return (*history, Message("user", text))
    said = "".join(m.content + ("\n\n" if m.role == "assistant" else "\n") for m in history)
    return f"{said}{text}\n"


def respond(
    context: StageContext,
    writer: Model,
    instructions: Sequence[Instruction],
    prompts: Mapping[str, Prompt],
    steering: Principles | Examples | None = None,
) -> list[Pair]:
    """Returns `respond.samples` responses to each of the (kept) instructions, dropped ones included.

    prompts: what the model is shown, by the instruction's id (see `prompt_for`).
    steering: principles or examples, whose prompts take the place of `prompts`.
    """
    settings = context.config.respond
    bare_stop = BARE_STOP if is_bare(context) else ()
    sampling = SamplingParams(
        temperature=settings.temperature[min(context.iteration, len(settings.temperature)) - 1],
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop=steering.stop if steering else bare_stop,
    )
    items = [(instruction, sample) for instruction in instructions for sample in range(settings.samples)]

    def request(instruction: Instruction, sample: int) -> Request:
        id = context.request_id("respond", instruction.id, sample)
        return steering.request(id, instruction) if steering else Request(id, prompts[instruction.id])

    with context.open("responses", len(items)) as stage:
        for block in stage.blocks(items):
            requests = [request(*item) for item in block]
            index = {request.id: i for i, request in enumerate(requests)}
            for completion in writer.generate(requests, sampling):
                i = index[completion.id]
                stage.put(i, _pair(settings.rules, *block[i], completion, steering))
    return stage.records


def _pair(
    rules: str,
    instruction: Instruction,
    sample: int,
    completion: Completion,
    steering: Principles | Examples | None,
) -> Pair:
    thoughts, text, reason = None, completion.text, None
    if steering:
        thoughts, text, reason = steering.read(text, instruction)
    text = clean_response(rules, text)
    if completion.finish_reason == "error":
        verdict = dropped("not decoded", completion.error)
    elif completion.finish_reason == "length":
        verdict = dropped("unfinished")
    else:
        reason = reason or response_reason(rules, instruction.instruction, instruction.input, text)
        verdict = dropped(reason) if reason else KEPT
    id = f"{instruction.id}-{sample}"
    return Pair(id, instruction.id, instruction.instruction, instruction.input, text, verdict, thoughts)
