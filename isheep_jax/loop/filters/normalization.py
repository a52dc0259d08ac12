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
    tokens: list[str] = []
    within_word = False
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)[0]
        if category == "M" and tokens:
            tokens[-1] += char
        elif _UNSPACED.match(char) and category in "LN":
            tokens.append(char)
            within_word = False
        elif category in "LN":
            if within_word:
                tokens[-1] += char
            else:
                tokens.append(char)
            within_word = True
        else:
            within_word = False
    return tokens


def normalize(text: str) -> str:
    """The words of a text, one space between them: equal for texts that differ only in case or punctuation."""
    return " ".join(tokenize(text))
