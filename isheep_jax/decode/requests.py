"""The decode engine's inputs and outputs as plain Python (no arrays): requests, sampling parameters, results."""

from dataclasses import dataclass
from typing import Literal

from isheep_jax.text.conversation import Prompt


@dataclass(frozen=True)
class TokenIds:
    """Ids of the model's own tokenizer, for callers that tokenize themselves: nothing is put before them."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A prompt with an id. The id and the run's seed decide the random numbers of its completion.

    prefix: text, or tokens, that the prompt (of a conversation: its first message) begins with and shares with other
    requests, such as a rubric; its keys and values are computed once for all of them.
    max_tokens: new tokens of this completion; 0: as many as the sampling parameters allow.
    """

    id: str
    prompt: Prompt | TokenIds
    prefix: str | TokenIds = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of the sampling of a completion. The model's end-of-turn tokens always end it."""

    temperature: float = 1.0
    """Sampling temperature; 0 takes the most probable token."""
    top_p: float = 1.0
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 256
    """New tokens per completion (count)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are cut off. As a JSON array where one has a comma: '["a, b", "c"]'."""
    top_k: int = 0
    """Sampling keeps so many of the most probable tokens (count; 0: all)."""
    min_p: float = 0.0
    """Sampling keeps tokens at least so probable, relative to the most probable one (0 to 1)."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or completion hold already (1: none)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion holds already (0: none)."""
    logprobs: bool = False
    """Whether completions carry the log-probability of each token."""

    @property
    def has_penalties(self) -> bool:
        """True where the tokens of prompt and completion change the logits of the next token."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0


# Intervals of the sampling parameters, written as in `config_checks.RANGES`.
SAMPLING_RANGES = {
    "temperature": "[0, 100]",
    "top_p": "(0, 1]",
    "max_tokens": "[1, 1000000]",
    "top_k": "[0, inf)",
    "min_p": "[0, 1]",
    "repetition_penalty": "(0, inf)",
    "presence_penalty": "(-inf, inf)",
}


NOT_NUMBERS = (
    "what the model computes is not numbers (NaN or infinity): its weights are damaged, or too large for compute_dtype"
)


@dataclass(frozen=True)
class Completion:
    """The result of generating for the `Request` with the same id.

    finish_reason: "stop" (end-of-turn token or stop string), "length" (max_tokens or decode.max_length is reached) or
    "error" (the prompt does not fit, or `NOT_NUMBERS`; `error` says why in one line).
    logprobs: natural logarithm of each token's probability under the model, before temperature, filters and penalties;
    empty unless the sampling parameters ask for it.
    stop: the stop string that ended it; "" where none did.
    """

    id: str
    text: str
    tokens: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str = ""
    logprobs: tuple[float, ...] = ()
    stop: str = ""


@dataclass(frozen=True)
class ChoiceLogprobs:
    """Natural-log probability of each choice as the continuation of a request's prompt, in the order of the choices.

    Where the tokens of a choice begin another one (" 1" and " 10" where digits are split), it is the probability that
    the other one does not follow: no text counts for both.
    """

    id: str
    logprobs: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class TextLogprob:
    """Natural-log probability of a text as the continuation of a request's prompt.

    logprob: sum over the text's tokens.
    tokens: how many tokens the text has; an end-of-turn token is not counted.
    greedy: whether each of them is the most probable one, so that a completion at temperature 0 would begin with them.
    logprobs: of each token.
    end: of the token that ends the text, after it; None for token ids, and for a model without one.
    spans: the characters of the text, from and to, that each token stands for: parts of a character share it. Empty for
    a text that was given as token ids.
    """

    id: str
    logprob: float = 0.0
    tokens: int = 0
    error: str = ""
    greedy: bool = False
    logprobs: tuple[float, ...] = ()
    end: float | None = None
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Embedding:
    """Mean of the last layer's hidden states over the tokens of a request's prompt: one float per model dimension."""

    id: str
    vector: tuple[float, ...] = ()
    error: str = ""
