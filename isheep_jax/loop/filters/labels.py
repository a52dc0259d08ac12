"""Labels of the form in which tasks are written, such as "Input:", and the ways to say that a task has no input.

Models write a label in several dresses: in bold, as a heading or an item of a list, with a full-width colon. All
patterns take linear time: no white space or number is searched from more than one place.
"""

import re
import unicodedata

NO_INPUT = "<noinput>"

# The number of a task, which may precede its label. It is not checked: models miscount.
_NUMBER = r"(?:\d+\s*[.:)]\s*)"
# The mark of a heading, of an item or of a quotation at the beginning of a line.
ITEM = r"(?:(?:#{1,2}|[-+•>*])[^\S\n]+)"

# Longest text that can say that there is no input (characters).
_LONGEST = 60
_SAYS_NO_INPUT = re.compile(
    r"[\W_]*(?:"
    r"(?:there[\W_]+is[\W_]+)?no[\W_]*(?:(?:additional|extra|further|other|specific)[\W_]+)?inputs?"
    r"(?:[\W_]+(?:is[\W_]+)?(?:needed|required|necessary|provided|given|available))?"
    r"|none(?:[\W_]+(?:needed|required|necessary|provided|given))?"
    r"|n\s?/\s?a|n\.\s?a\.?|not[\W_]+applicable|null|nil"
    r")[\W_]*"
)
_ONLY_DASHES = re.compile(r"[-‐-―−]+")


def label(names: str) -> str:
    """Returns the pattern of a label with one of the names ("input|output") and a number perhaps; it has no groups."""
    plain, dressed = rf"(?:{names})\s*[:：]", []
    for mark in (r"\*\*\*", r"\*\*", r"\*", "__", "_", "`"):
        dressed.append(rf"{mark}{_NUMBER}?(?:{names})\s*(?:{mark}\s*[:：]|[:：]\s*{mark})")
    return rf"{_NUMBER}?(?:{plain}|\[(?:{names})\]\s*[:：]|{'|'.join(dressed)})"


def line_label(names: str) -> str:
    """Returns the pattern of such a label that begins a line, from the line break on."""
    return rf"\n[^\S\n]*{ITEM}?{label(names)}"


def is_no_input(text: str) -> bool:
    """Returns whether an input only says that there is none, such as "<noinput>", "No input needed." or "N/A"."""
    if len(text) > _LONGEST:
        return False
    plain = unicodedata.normalize("NFKC", text).strip().lower()
    return bool(_SAYS_NO_INPUT.fullmatch(plain) or _ONLY_DASHES.fullmatch(plain))
