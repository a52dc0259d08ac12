"""Lists of requests of fixed lengths that stand for the loop's three decoding stages, to measure the engine's speed.

Only lengths matter: token ids are random, no token ends a completion, and a request's max_tokens is its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from isheep_jax.decode.requests import Request
from isheep_jax.model.architecture import Architecture
from isheep_jax.text.conversation import Prompt

# About 100 million parameters (100,092,672): what speeds of the engine and of its peers are compared on.
LLAMA_100M = Architecture(
    family="llama",
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    layers=12,
    heads=12,
    kv_heads=4,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    context_length=2048,
    tied_embeddings=True,
    bos_token_id=None,
    eos_token_ids=(),
)

# Lower ids are special tokens in most vocabularies.
_FIRST_ID = 3


@dataclass(frozen=True)
class Workload:
    """Lengths of a stage's requests, in tokens.

    kind: "generate" draws new_tokens[i] tokens behind prompt i; "score" finds the log-probability of each of `choices`
    continuations of one token, and draws none. prompt_lengths: without the head. head_length: tokens that all prompts
    begin with. seed: of the token ids.
    """

    name: str
    kind: Literal["generate", "score"]
    prompt_lengths: tuple[int, ...]
    new_tokens: tuple[int, ...] = ()
    head_length: int = 0
    choices: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request: head, prompt and what follows it."""
        follows = self.new_tokens or (1,) * len(self)
        return self.head_length + max(map(sum, zip(self.prompt_lengths, follows)))

    def within(self, context: int) -> "Workload":
        """The same, with all lengths scaled down so that every request fits the context."""
        share = min(1.0, context / self.longest)

        def scaled(lengths: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(1, int(length * share)) for length in lengths)

        head = int(self.head_length * share)
        return replace(
            self, prompt_lengths=scaled(self.prompt_lengths), new_tokens=scaled(self.new_tokens), head_length=head
        )

    def prompts(self, vocabulary: int) -> tuple[list[int], list[list[int]]]:
        """Token ids below `vocabulary`: those of the head, and of each prompt behind it."""
        rng = np.random.default_rng(self.seed)
        head, *rest = (
            rng.integers(_FIRST_ID, vocabulary, length).tolist() for length in (self.head_length, *self.prompt_lengths)
        )
        return head, rest

    def requests(self, vocabulary: int) -> list[Request]:
        """Requests whose texts are decimal token ids, for an engine whose tokenizer is an `IdTokenizer`."""
        head, prompts = self.prompts(vocabulary)
        limits = self.new_tokens or (1,) * len(self)
        return [
            Request(f"{self.name}-{i:05d}", _text(head + prompt), prefix=_text(head), max_tokens=limit)
            for i, (prompt, limit) in enumerate(zip(prompts, limits))
        ]

    def choice_texts(self) -> tuple[str, ...]:
        """The continuations to score, as decimal token ids."""
        return tuple(str(_FIRST_ID + i) for i in range(self.choices))


@dataclass(frozen=True)
class IdTokenizer:
    """Stands in for a tokenizer: a text is a list of decimal token ids. No token ends a completion."""

    vocab_size: int
    eos_ids: tuple[int, ...] = ()

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [int(word) for word in prompt.split()]

    def encode_choices(self, prompt: Prompt, choices: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in choice.split()] for choice in choices]

    def decode(self, ids: list[int]) -> str:
        return _text(ids)


def _text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def synthesize(count: int, seed: int = 0) -> Workload:
    """Few-shot prompts of 400 tokens, 64 to 512 new ones."""
    new = np.random.default_rng(seed).integers(64, 513, count)
    return Workload("synthesize", "generate", (400,) * count, tuple(new.tolist()), seed=seed)


def respond(count: int, seed: int = 0) -> Workload:
    """Instructions of 20 to 200 tokens, answers of 1 to 400: log-normal with a median of 55 and sigma 0.8, clipped."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(20, 201, count)
    new = np.clip(np.rint(rng.lognormal(np.log(55), 0.8, count)), 1, 400).astype(int)
    return Workload("respond", "generate", tuple(prompts.tolist()), tuple(new.tolist()), seed=seed)


def assess(count: int, seed: int = 0) -> Workload:
    """Pairs of instruction and answer, 60 to 300 tokens, behind a rubric of 300; ten choices of one token each."""
    prompts = np.random.default_rng(seed).integers(60, 301, count)
    return Workload("assess", "score", tuple(prompts.tolist()), head_length=300, choices=10, seed=seed)


WORKLOADS = {"synthesize": synthesize, "respond": respond, "assess": assess}
