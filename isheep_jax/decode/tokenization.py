"""Tokenizes requests, splits off the prefix that they share with others, and checks that they fit."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isheep_jax.decode.requests import Request, TokenIds
from isheep_jax.decode.sampling import request_key
from isheep_jax.errors import UserError
from isheep_jax.text.conversation import Message, Prompt
from isheep_jax.text.tokenizer import Tokenizer

# A shorter prefix is prefilled with each prompt: sharing it would save less than the program for it costs (tokens).
_SHORTEST_PREFIX = 32


class PromptError(UserError):
    """A prompt that cannot be decoded."""


class TooLong(PromptError):
    """A prompt that does not fit in decode.max_length together with what must follow it.

    tokens: tokens of the prompt.
    spare: tokens that must fit after it.
    max_length: the setting.
    continuation: name of a given text that must follow, such as "its longest choice"; "": new tokens.
    """

    def __init__(self, tokens: int, spare: int, max_length: int, continuation: str = ""):
        self.tokens, self.spare, self.max_length, self.continuation = tokens, spare, max_length, continuation
        if continuation:
            message = f" and {continuation} {spare}; decode.max_length={max_length} must hold both"
        else:
            spare_tokens = {0: "", 1: " and a new token"}.get(spare, f" and {spare} more")
            message = f"; decode.max_length={max_length} must hold it{spare_tokens} (at most the model's context)"
        super().__init__(f"the prompt has {tokens} tokens{message}")


@dataclass(frozen=True, eq=False)
class TokenizedPrompt:
    """A request's tokens.

    prefix: tokens shared with other requests, prefilled once.
    suffix: the tokens after the prefix, [T] int32.
    key: random key, [2] uint32.
    max_tokens: the request's own limit of new tokens; 0: none.
    """

    id: str
    prefix: tuple[int, ...]
    suffix: np.ndarray
    key: np.ndarray
    max_tokens: int

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return len(self.prefix) + len(self.suffix)


def tokenize(
    tokenizer: Tokenizer,
    request: Request,
    *,
    tokens: list[int] | None = None,
    seed: int,
    max_length: int,
    spare: int,
    continuation: str = "",
) -> TokenizedPrompt:
    """Returns a request's tokens.

    Args:
        tokenizer: the model's.
        request: the prompt, its id and its prefix.
        tokens: the prompt's, where they are known.
        seed: the run's seed, from which the random key comes.
        max_length: longest sequence (tokens).
        spare: tokens that must fit after the prompt.
        continuation: name of the given text that those tokens belong to, for the error message; "": new tokens.

    Raises `TooLong` where prompt and spare tokens are more than `max_length`, and `PromptError` for an empty prompt or
    a token that does not exist.
    """
    if tokens is None:
        tokens = prompt_tokens(tokenizer, request.prompt)
    if not tokens:
        raise PromptError("the prompt is empty")
    if len(tokens) + spare > max_length:
        raise TooLong(len(tokens), spare, max_length, continuation)
    shared = _prefix_length(tokenizer, request, tokens)
    return TokenizedPrompt(
        id=request.id,
        prefix=tuple(tokens[:shared]),
        suffix=np.asarray(tokens[shared:], np.int32),
        key=request_key(seed, request.id),
        max_tokens=request.max_tokens,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt | TokenIds) -> list[int]:
    """Returns the tokens of a prompt. Raises `PromptError` for a token that does not exist."""
    return known_tokens(tokenizer, prompt) if isinstance(prompt, TokenIds) else tokenizer.encode_prompt(prompt)


def many_prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[Prompt | TokenIds]) -> list[list[int] | UserError]:
    """Returns for each prompt what `prompt_tokens` returns or raises; texts are tokenized on all cores."""
    texts = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, TokenIds)}
    found = dict(zip(texts, tokenizer.encode_prompts(list(texts.values()))))
    for i, prompt in enumerate(prompts):
        if i not in found:
            try:
                found[i] = known_tokens(tokenizer, prompt)
            except UserError as error:
                found[i] = error
    return [found[i] for i in range(len(prompts))]


def known_tokens(tokenizer: Tokenizer, tokens: TokenIds) -> list[int]:
    """Returns the ids. Raises `PromptError` for one that is not the tokenizer's."""
    unknown = next((i for i in tokens.ids if not 0 <= i < tokenizer.vocab_size), None)
    if unknown is not None:
        raise PromptError(f"there is no token {unknown}: the tokenizer has {tokenizer.vocab_size}")
    return list(tokens.ids)


def _prefix_length(tokenizer: Tokenizer, request: Request, tokens: list[int]) -> int:
    """Returns how many tokens belong to the request's prefix; 0 where sharing them is impossible or not worthwhile."""
    if not request.prefix:
        return 0
    if isinstance(request.prefix, TokenIds):
        prefix = request.prefix.ids
    else:
        role = request.prompt[0].role if isinstance(request.prompt, tuple) else None
        prefix = _prefix_tokens(tokenizer, request.prefix, role)
    if not _SHORTEST_PREFIX <= len(prefix) < len(tokens):
        return 0
    return len(prefix) if tuple(tokens[: len(prefix)]) == prefix else 0


def shared_tokens(tokenizer: Tokenizer, prefix: str, role: str | None) -> int:
    """Returns how many tokens are shared by prompts that begin with a text; 0 where that is not worthwhile.

    role: as in `_prefix_tokens`.
    """
    tokens = len(_prefix_tokens(tokenizer, prefix, role)) if prefix else 0
    return tokens if tokens >= _SHORTEST_PREFIX else 0


@functools.lru_cache(maxsize=64)
def _prefix_tokens(tokenizer: Tokenizer, prefix: str, role: str | None) -> tuple[int, ...]:
    """Returns a prefix's tokens without the last one, which the following text may change.

    role: of the message that begins with the prefix; None: a prompt of plain text.
    """
    if role is None:
        return tuple(tokenizer.encode_prompt(prefix)[:-1])
    # The template appends an end of turn; the common prefix of two renderings excludes it.
    one, other = (tokenizer.encode_prompt((Message(role, text),)) for text in (prefix, f"{prefix}\n\n\n"))
    common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return tuple(one[: max(common - 1, 0)])
