"""Words of a text, and the form in which two texts count as the same: lower case, no punctuation, one space."""

import re
import unicodedata

_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts that put no spaces between words: every character counts as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)


def tokenize(text: str) -> list[str]:
    """Lower-case words of any script, without punctuation; single characters where a script has no spaces.

    On ASCII text these are the tokens of ROUGE's usual tokenizer (without stemming).
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = unicodedata.normalize("NFC", text)
    return [text[begin:end] for begin, end in word_spans(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Returns the characters, from and to, of each word of a text."""
    spans: list[tuple[int, int]] = []
    within_word = False
    for i, char in enumerate(text):
        category = unicodedata.category(char)[0]
        follows = bool(spans) and spans[-1][1] == i
        unspaced = _UNSPACED.match(char) is not None
        if follows and (category == "M" or (within_word and category in "LN" and not unspaced)):
            spans[-1] = spans[-1][0], i + 1
        elif category in "LN":
            spans.append((i, i + 1))
        if category != "M":
            within_word = category in "LN" and not unspaced
    return spans


def normalize(text: str) -> str:
    """The words of a text, one space between them: equal for texts that differ only in case or punctuation."""
    return " ".join(tokenize(text))
