"""What goes into the decode engine and what comes out, in plain Python (no arrays)."""

from dataclasses import dataclass
from typing import Literal

from isheep_jax.model.conversation import Prompt


@dataclass(frozen=True)
class Request:
    """A prompt with a name. The name, with the run's seed, decides the random numbers of its completion."""

    id: str
    prompt: Prompt


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a stage are drawn.

    temperature: 0 takes the most probable token. top_p: 1 keeps the whole distribution. max_tokens: new tokens per
    completion. stop: strings that end a completion (they are cut off); the model's end-of-turn tokens always do.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to a `Request`, found by its id.

    finish: "stop" (end-of-turn token or stop string), "length" (max_tokens or the context is used up) or "error" (the
    prompt does not fit; `error` says why in one line).
    """

    id: str
    text: str
    tokens: tuple[int, ...] = ()
    finish: Literal["stop", "length", "error"] = "stop"
    error: str = ""


@dataclass(frozen=True)
class ChoiceScores:
    """Natural-log probabilities of each given continuation of a request's prompt, in the order of the choices."""

    id: str
    logprobs: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class TextScore:
    """How probable a given text is as the continuation of a request's prompt.

    logprob: sum of the natural-log probabilities of its tokens. tokens: how many there are, an end of turn not counted.
    """

    id: str
    logprob: float = 0.0
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Embedding:
    """Mean of the last layer's hidden states over the tokens of a request's prompt (floats, one per model dimension)."""

    id: str
    vector: tuple[float, ...] = ()
    error: str = ""
