"""A response to each instruction, without examples, by principles or by similar pairs, then the response rules.

Without: I-SHEEP sections 3.1 and 3.2.
"""

from collections.abc import Iterator, Mapping, Sequence

from isheep_jax.config import Config
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.loop.filters.text_rules import clean_response, response_reason
from isheep_jax.loop.prompting.principles import Principles
from isheep_jax.loop.prompting.similar import Examples
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.loop.records import KEPT, Instruction, Pair, dropped, user_text
from isheep_jax.loop.run_directory import Stage
from isheep_jax.loop.stages.synthesize import counts
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


def is_bare(config: Config, iteration: int) -> bool:
    """Whether responses continue bare text, not a conversation."""
    return iteration == 1 and config.respond.base_prompt == "bare"


def prompt_for(instruction: str, input: str, bare: bool, before: Conversation = ()) -> Prompt:
    """bare: the text and a line break, to be continued; otherwise a conversation. before: what was said already."""
    text = user_text(instruction, input)
    if not bare:
        return (*before, Message("user", text))
    said = "".join(m.content + ("\n\n" if m.role == "assistant" else "\n") for m in before)
    return f"{said}{text}\n"


def respond(
    model: Model,
    config: Config,
    instructions: Sequence[Instruction],
    prompts: Mapping[str, Prompt],
    stage: Stage[Pair],
    iteration: int,
    progress: StageReporter,
    steered: Principles | Examples | None = None,
) -> list[Pair]:
    """`respond.samples` responses to each of the (kept) instructions, dropped ones included.

    prompts: what the model is shown, by the instruction's id (see `prompt_for`). steered: principles or examples, which
    stand in their place where they are given.
    """
    settings = config.respond
    bare_stop = BARE_STOP if is_bare(config, iteration) else ()
    sampling = SamplingParams(
        temperature=settings.temperature[min(iteration, len(settings.temperature)) - 1],
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop=steered.stop if steered else bare_stop,
    )
    items = [(instruction, sample) for instruction in instructions for sample in range(settings.samples)]

    def process(block: Sequence[tuple[Instruction, int]]) -> Iterator[tuple[int, Pair]]:
        ids = [f"{iteration}/respond/{x.id}/{sample}" for x, sample in block]
        requests = [steered.request(id, x) if steered else Request(id, prompts[x.id]) for id, (x, _) in zip(ids, block)]
        index = {request.id: i for i, request in enumerate(requests)}
        for completion in model.generate(requests, sampling):
            i = index[completion.id]
            instruction, sample = block[i]
            thoughts, text, reason = None, completion.text, None
            if steered:
                thoughts, text, reason = steered.read(text, instruction)
            text = clean_response(settings.rules, text)
            if completion.finish_reason == "error":
                verdict = dropped("not decoded", completion.error)
            elif completion.finish_reason == "length":
                verdict = dropped("unfinished")
            else:
                reason = reason or response_reason(settings.rules, instruction.instruction, instruction.input, text)
                verdict = dropped(reason) if reason else KEPT
            yield (
                i,
                Pair(
                    f"{instruction.id}-{sample}",
                    instruction.id,
                    instruction.instruction,
                    instruction.input,
                    text,
                    verdict,
                    thoughts,
                ),
            )

    pairs = stage.work(items, process, progress.advance)
    stage.finish(counts(pairs))
    return pairs
