"""Tokenizes what follows a prompt together with the end of the prompt only, for the ids that both would have together.

A prompt is scored with many continuations, and is much longer than these. Where a tokenizer is local (see `Backend`),
a text can be cut before a word: what precedes the space changes no id from there on, and what follows changes none
before it.
"""

from collections.abc import Iterator, Sequence

from isheep_jax.text.control_names import HiddenNames
from isheep_jax.text.tokenizer_backends import Span


class PromptEnd:
    """The end of a prompt.

    ids: of the whole prompt.
    """

    def __init__(self, hidden: HiddenNames, marked: str, ids: Sequence[int] | None):
        """Finds a place to cut.

        Args:
            hidden: what is hidden in prompt and continuations.
            marked: the prompt.
            ids: the prompt's ids, where they are known.
        """
        self._hidden, self._marked = hidden, marked
        self.ids = hidden.encode(marked) if ids is None else list(ids)
        self._begin, self._tokens = self._cut()

    def _cut(self) -> tuple[int, list[int]]:
        """Returns where the text begins that continuations are tokenized with, and its ids in the prompt."""
        if self._hidden.is_local:
            # Tokenizers may treat the first word of a text as no other one, so that the end has two words at least.
            last, before = (*_words(self._marked, 2), 0, 0)[:2]
            if before:
                tokens = self._hidden.encode(self._marked[before:])
                first = self._hidden.encode(self._marked[before : last - 1])
                own = len(tokens) - len(first)
                if 0 < own <= len(self.ids) and tokens[: len(first)] == first and tokens[-own:] == self.ids[-own:]:
                    return before, tokens
        return 0, self.ids

    def align(self, marked: str) -> tuple[list[int], list[Span]] | None:
        """Returns the ids that follow the prompt's, and the characters of both texts, restored, that they stand for.

        marked: what follows. None: with it, the prompt has other ids.
        """
        ids, spans = self._hidden.align(self._marked[self._begin :] + marked)
        count = len(self._tokens)
        if ids[:count] != self._tokens:
            return None
        return ids[count:], [(first + self._begin, end + self._begin) for first, end in spans[count:]]


def _words(text: str, count: int) -> Iterator[int]:
    """Yields where the last words of a text begin that follow a visible ASCII character and a space, the last first."""
    end = len(text) - 1
    while count and (space := text.rfind(" ", 1, end)) > 0:
        if "!" <= text[space - 1] <= "~" and text[space + 1].isascii() and text[space + 1].isalpha():
            yield space + 1
            count -= 1
        end = space
