"""Which parts of a response are copied from what was asked, so that a reading can leave them out."""

import unicodedata
from collections.abc import Sequence

from isheep_jax.loop.filters.normalization import word_spans

# Words in a row that make a copy. With two, good answers lose more than copies do: they take up the task's phrases.
WORDS = 3

_Word = tuple[str, int, int]


def copied_tokens(
    sources: Sequence[str], text: str, spans: Sequence[tuple[int, int]], words: int = WORDS
) -> list[bool]:
    """Returns for each token of a text whether it is copied from one of the sources.

    A token is copied where all of it but white space is among `words` words in a row, or what is between them, that a
    source has as well. Case and punctuation make no difference; in scripts without spaces a character is a word.

    spans: the characters of the text, from and to, that each token stands for.
    """
    known = {gram for source in sources for gram, _, _ in _grams(_words(source), words)}
    copied = [False] * len(text)
    for gram, begin, end in _grams(_words(text), words):
        if gram in known:
            copied[begin:end] = [True] * (end - begin)

    def is_copied(begin: int, end: int) -> bool:
        # White space belongs to what it is next to.
        marks = [i for i in range(begin, end) if not text[i].isspace()] or range(begin, end)
        return begin < end and all(copied[i] for i in marks)

    return [is_copied(*span) for span in spans]


def _words(text: str) -> list[_Word]:
    return [(unicodedata.normalize("NFC", text[begin:end].lower()), begin, end) for begin, end in word_spans(text)]


def _grams(words: Sequence[_Word], count: int) -> list[tuple[tuple[str, ...], int, int]]:
    """Returns each run of `count` words, with its first and last character; none where the count is 0."""
    if not count:
        return []
    runs = zip(*(words[i:] for i in range(count)))
    return [(tuple(word for word, _, _ in run), run[0][1], run[-1][2]) for run in runs]
