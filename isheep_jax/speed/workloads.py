"""Lists of requests with the lengths of the loop's three decoding stages, to measure the engine's speed on.

Only lengths matter: token ids are random, no token ends a completion, and a request's max_tokens is its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from isheep_jax.decode.requests import Request
from isheep_jax.text.conversation import Prompt

# Lower ids are special tokens in most vocabularies.
_FIRST_ID = 3


@dataclass(frozen=True)
class Workload:
    """Lengths of a stage's requests, in tokens.

    kind: "generate" samples new_tokens[i] tokens after prompt i; "score" finds the log-probability of each of `choices`
      continuations of one token, and samples none.
    prompt_lengths: length of each prompt without the shared prefix.
    new_tokens: length of each completion.
    prefix_length: tokens that all prompts begin with.
    choices: how many continuations are scored.
    seed: seeds the token ids.
    """

    name: str
    kind: Literal["generate", "score"]
    prompt_lengths: tuple[int, ...]
    new_tokens: tuple[int, ...] = ()
    prefix_length: int = 0
    choices: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request: prefix, prompt and completion or choice."""
        continuations = self.new_tokens or (1,) * len(self)
        return self.prefix_length + max(map(sum, zip(self.prompt_lengths, continuations)))

    def within(self, max_length: int) -> "Workload":
        """Returns the workload with all lengths scaled down so that every request has at most `max_length` tokens."""
        share = min(1.0, max_length / self.longest)

        def scaled(lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(1, int(length * share)) for length in lengths)

        return replace(
            self,
            prompt_lengths=scaled(self.prompt_lengths),
            new_tokens=scaled(self.new_tokens),
            prefix_length=int(self.prefix_length * share),
        )

    def prompts(self, vocabulary: int) -> tuple[list[int], list[list[int]]]:
        """Returns token ids below `vocabulary`: those of the prefix, and of each prompt after it."""
        rng = np.random.default_rng(self.seed)
        lengths = (self.prefix_length, *self.prompt_lengths)
        prefix, *prompts = (rng.integers(_FIRST_ID, vocabulary, length).tolist() for length in lengths)
        return prefix, prompts

    def requests(self, vocabulary: int) -> list[Request]:
        """Returns requests whose texts are decimal token ids, for an engine with an `IdTokenizer`."""
        prefix, prompts = self.prompts(vocabulary)
        limits = self.new_tokens or (1,) * len(self)
        return [
            Request(f"{self.name}-{i:05d}", _text(prefix + prompt), prefix=_text(prefix), max_tokens=limit)
            for i, (prompt, limit) in enumerate(zip(prompts, limits))
        ]

    def choice_texts(self) -> tuple[str, ...]:
        """Returns the continuations to score, as decimal token ids."""
        return tuple(str(_FIRST_ID + i) for i in range(self.choices))


@dataclass(frozen=True)
class IdTokenizer:
    """A tokenizer whose texts are lists of decimal token ids. No token ends a completion."""

    vocab_size: int
    eos_ids: tuple[int, ...] = ()

    def missing_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        return ()

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [int(word) for word in prompt.split()]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [self.encode_prompt(prompt) for prompt in prompts]

    def encode_choices(
        self, prompt: Prompt, choices: Sequence[str], ids: Sequence[int] | None = None
    ) -> list[list[int]]:
        return [[int(word) for word in choice.split()] for choice in choices]

    def decode(self, ids: list[int]) -> str:
        return _text(ids)


def _text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def synthesize(count: int, seed: int = 0) -> Workload:
    """Few-shot prompts of 400 tokens, 64 to 512 new tokens each."""
    new = np.random.default_rng(seed).integers(64, 513, count)
    return Workload("synthesize", "generate", (400,) * count, tuple(new.tolist()), seed=seed)


def respond(count: int, seed: int = 0) -> Workload:
    """Instructions of 20 to 200 tokens, responses of 1 to 400: log-normal, median 55 and sigma 0.8, clipped."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(20, 201, count)
    new = np.clip(np.rint(rng.lognormal(np.log(55), 0.8, count)), 1, 400).astype(int)
    return Workload("respond", "generate", tuple(prompts.tolist()), tuple(new.tolist()), seed=seed)


def assess(count: int, seed: int = 0) -> Workload:
    """Pairs of instruction and response, 60 to 300 tokens, after a rubric of 300; ten choices of one token each."""
    prompts = np.random.default_rng(seed).integers(60, 301, count)
    return Workload("assess", "score", tuple(prompts.tolist()), prefix_length=300, choices=10, seed=seed)


WORKLOADS = {"synthesize": synthesize, "respond": respond, "assess": assess}
