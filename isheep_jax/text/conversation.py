"""The types of prompts: a message, a conversation, and text or a conversation to continue."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]

# Plain text to continue, or a conversation, which the model's chat template renders up to the header of the
# assistant's turn.
Prompt = str | Conversation
