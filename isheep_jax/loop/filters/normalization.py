"""Words of a text, and the form in which two texts count as the same: lower case, no punctuation, one space."""

import re
import unicodedata

_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts that put no spaces between words: every character counts as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)

# Marks with a meaning of their own, besides the characters that Unicode calls symbols.
_SYMBOLS = frozenset("#%&*@/\\")
_MAY_BE_SYMBOL = re.compile(r"[#%&*@/\\$+<=>^`|~-]|(?![’‘“”«»—–…。，、？！：；])[^\x00-\x7f\w\s]")


def tokenize(text: str) -> list[str]:
    """Lower-case words of any script, without punctuation; single characters where a script has no spaces.

    On ASCII text these are the tokens of ROUGE's usual tokenizer (without stemming).
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = unicodedata.normalize("NFC", text)
    return [text[begin:end] for begin, end in word_spans(text)]


def with_symbols(text: str) -> tuple[str, ...] | None:
    """Returns the words and symbols of a text, such as "c", "+", "+"; None where it has no symbols.

    A symbol changes what a text says ("C#" and "C++", "2 - 2" and "2 + 2"), other than the punctuation of sentences.
    """
    symbols = [match.span() for match in _MAY_BE_SYMBOL.finditer(text) if _is_symbol(text, *match.span())]
    if not symbols:
        return None
    parts: list[str] = []
    end = 0
    for begin, after in symbols:
        parts += [*tokenize(text[end:begin]), text[begin:after]]
        end = after
    return (*parts, *tokenize(text[end:]))


def is_symbol(part: str) -> bool:
    """Returns whether a part of a text, as `with_symbols` gives it, is a symbol."""
    return len(part) == 1 and _MAY_BE_SYMBOL.match(part) is not None


def _is_symbol(text: str, begin: int, end: int) -> bool:
    char = text[begin]
    if char == "-":  # a minus, but no hyphen and no dash
        return text[end : end + 2].lstrip()[:1].isdigit()
    return char in _SYMBOLS or unicodedata.category(char)[0] == "S"


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
