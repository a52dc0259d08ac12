"""Zero-shot prompts for responses: the instruction alone, as bare text or as a conversation (I-SHEEP section 3.2)."""

from collections.abc import Mapping

from isheep_jax.decode.requests import Request
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.prompting.protocols import ParsedResponse
from isheep_jax.loop.records import Instruction, user_text
from isheep_jax.text.conversation import Conversation, Message, Prompt

# A base model continues a bare instruction with a dialogue of its own, whose turns end the response.
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
    """Returns whether responses continue bare text instead of a conversation."""
    return context.iteration == 1 and context.config.respond.base_prompt == "bare"


def prompt_for(instruction: str, input: str, *, bare: bool = False, history: Conversation = ()) -> Prompt:
    """Returns the prompt for a response to an instruction.

    Args:
        instruction: The instruction.
        input: Its input, or "".
        bare: Whether the prompt is text to be continued; otherwise it is a conversation.
        history: Earlier turns of the conversation.
    """
    text = user_text(instruction, input)
    if not bare:
        return (*history, Message("user", text))
    earlier = "".join(m.content + ("\n\n" if m.role == "assistant" else "\n") for m in history)
    return f"{earlier}{text}\n"


class ZeroShot:
    """The prompts by the instruction's id, as `prompt_for` makes them."""

    def __init__(self, context: StageContext, prompts: Mapping[str, Prompt]):
        self.stop = BARE_STOP if is_bare(context) else ()
        self._prompts = prompts

    def request(self, id: str, instruction: Instruction) -> Request:
        return Request(id, self._prompts[instruction.id])

    def parse(self, text: str, instruction: Instruction) -> ParsedResponse:
        return ParsedResponse(None, text, None)
