"""How the judge is asked: by a text to be continued, or by a user's turn with the assistant's first words given."""

from isheep_jax.decode.requests import Request
from isheep_jax.loop.judging.reader import Framing, Reader
from isheep_jax.text.conversation import Message, Prompt

# The assistant's first words where a template is a single line.
_FIRST_WORDS = "Rating (1 to 10):"


def framed(text: str, framing: Framing) -> Prompt:
    """Returns the prompt that asks with a text: the text itself, or a conversation that its last line goes on with."""
    if framing == "text":
        return text
    asked, _, begun = text.rpartition("\n")
    asked, begun = (asked.rstrip("\n"), begun) if asked else (begun, _FIRST_WORDS)
    return (Message("user", asked), Message("assistant", begun))


def ask(reader: Reader, id: str, template: str, **variables: object) -> Request:
    """Returns the request that asks the judge with a template."""
    text = reader.templates.render(template, **variables)
    return Request(id, framed(text, reader.framing), reader.templates.prefix(template))
