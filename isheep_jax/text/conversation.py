"""The types of prompts: a message, a conversation, and text or a conversation to continue."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]


def opened(conversation: Conversation) -> bool:
    """Returns whether the last message is an assistant's, which is then to be continued."""
    return bool(conversation) and conversation[-1].role == "assistant"


# Plain text to continue, or a conversation. The model's chat template renders a conversation up to the header of the
# assistant's turn or, where the last message is the assistant's, up to the end of what that message says so far.
Prompt = str | Conversation
