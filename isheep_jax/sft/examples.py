"""The example that fine-tuning learns from, in plain Python: all that the loop needs to know of `sft`."""

from dataclasses import dataclass

from isheep_jax.text.conversation import Conversation


@dataclass(frozen=True)
class Example:
    """A conversation that ends with a user turn, and the response to learn. Only the response carries loss."""

    id: str
    conversation: Conversation
    response: str
