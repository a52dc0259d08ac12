"""A tokenizer in which every letter is a token."""

import itertools
from collections.abc import Iterable, Sequence

from isheep_jax.text.conversation import Conversation


class LetterTokenizer:
    """0 begins a text, 1 ends a turn, 2 separates a conversation from its response, and letters are 3, 4, ...

    All other tokens decode to nothing.
    """

    bos_id, eos_ids, pad_id = 0, (1,), 1

    def __init__(self, vocab_size: int = 32):
        self.vocab_size = vocab_size

    def missing_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        return ()

    def encode_prompt(self, prompt: str) -> list[int]:
        return [0, *self.letters(prompt)]

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.encode_prompt(prompt) for prompt in prompts]

    def encode_choices(self, prompt: str, choices: Sequence[str], ids: Sequence[int] | None = None) -> list[list[int]]:
        return [self.letters(choice) for choice in choices]

    def align_continuation(
        self, prompt: str | Conversation, text: str, ids: Sequence[int] | None = None
    ) -> tuple[list[int], list[tuple[int, int]], int]:
        return self.letters(text), [(i, i + 1) for i in range(len(text))], 1

    def encode_example(self, conversation: Conversation, response: str) -> tuple[list[int], list[int]]:
        prompt = [0, *itertools.chain.from_iterable(self.letters(m.content) for m in conversation), 2]
        answer = [*self.letters(response), 1]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(i - 3 + ord("a")) for i in ids if 3 <= i < 29)

    def letters(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 3 for letter in text]
