"""Requests as tokens: what they share with others, and what is their own."""

import functools
from dataclasses import dataclass

import numpy as np

from isheep_jax.decode.requests import Request
from isheep_jax.decode.sampling import request_key
from isheep_jax.errors import UserError
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer

# A shorter head is computed with each prompt: it would save less than the program for it costs.
_SHORTEST_SHARED = 32


class TooLong(UserError):
    """A prompt that does not fit."""


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A request's tokens.

    shared: those of its head. own: what follows [T] (int32). key: random key [2] (uint32). max_tokens: of the request.
    """

    id: str
    shared: tuple[int, ...]
    own: np.ndarray
    key: np.ndarray
    max_tokens: int

    @property
    def length(self) -> int:
        return len(self.shared) + len(self.own)


def tokenize(tokenizer: Tokenizer, request: Request, seed: int, context: int, spare: int) -> TokenizedPrompt:
    """Raises `TooLong` unless `context` holds the prompt and `spare` tokens more, and `UserError` for no prompt."""
    tokens = tokenizer.encode_prompt(request.prompt)
    if not tokens:
        raise TooLong("the prompt is empty")
    if len(tokens) + spare > context:
        more = "a new token" if spare == 1 else f"{spare} more"
        raise TooLong(f"the prompt has {len(tokens)} tokens; decode.max_length={context} must hold it and {more}")
    shared = _shared(tokenizer, request, tokens)
    own, key = np.asarray(tokens[shared:], np.int32), request_key(seed, request.id)
    return TokenizedPrompt(request.id, tuple(tokens[:shared]), own, key, request.max_tokens)


def _shared(tokenizer: Tokenizer, request: Request, tokens: list[int]) -> int:
    """How many of the tokens are those of the request's head."""
    if not request.prefix:
        return 0
    role = None if isinstance(request.prompt, str) else request.prompt[0].role
    head = _head_tokens(tokenizer, request.prefix, role)
    fits = _SHORTEST_SHARED <= len(head) < len(tokens)
    return len(head) if fits and tuple(tokens[: len(head)]) == head else 0


@functools.lru_cache(maxsize=64)
def _head_tokens(tokenizer: Tokenizer, head: str, role: str | None) -> tuple[int, ...]:
    """A head's tokens but for the last, which what follows may change."""

    if role is None:
        return tuple(tokenizer.encode_prompt(head)[:-1])
    # Behind a message its turn's end is rendered: where two that begin with the head part, it has ended.
    one, other = (tokenizer.encode_prompt((Message(role, text),)) for text in (head, f"{head}\n\n\n"))
    common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return tuple(one[: max(common - 1, 0)])
