"""What a model is given to continue, in plain Python (no arrays)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]

# A prompt is bare text to be continued, or a conversation to be rendered with the model's chat template
# (ending with the header of the assistant's turn).
Prompt = str | Conversation
