"""The exceptions whose message is one line for the user, and what such lines are made of."""

import difflib
import re
from collections.abc import Iterable

# Characters of a line on a terminal or in a log, at most.
MOST_IN_LINE = 4000

# Controls (C0, C1), marks without a width, and those that reorder text. The joiners of words and emoji are harmless.
_ACTED_ON = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


class UserError(Exception):
    """Bad input. The message is one line that names the setting or file and what would be right.

    Commands print it to stderr without a traceback and exit with code 2.
    """


class NothingLeftError(UserError):
    """The input is good, but the run has no data left: the model writes nothing new, or too little is kept."""


def one_line(error: Exception) -> str:
    """Returns an exception's message without line breaks, to be quoted in a `UserError`."""
    return " ".join(str(error).split())


def printable(text: str, most: int | None = MOST_IN_LINE) -> str:
    """Returns a text that a terminal only shows, and acts on in no way.

    Control characters, marks that reorder text and lone surrogates become escapes such as "\\x1b". Line breaks and tabs
    stay. most: characters of a line; None: all of them.
    """
    lines = text.split("\n")
    cut = lines if most is None else [_cut(line, most) for line in lines]
    return "\n".join(_ACTED_ON.sub(lambda match: match[0].encode("unicode_escape").decode(), line) for line in cut)


def _cut(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[:most]}... ({len(line) - most} more characters)"


def quoted(value: object, most: int = 80) -> str:
    """Returns a value out of a file for a message: at most so many characters, none of which a terminal acts on."""
    text = value if isinstance(value, str) else repr(value)
    shown = printable(text[:most]).replace("\n", "\\n").replace("\t", "\\t")
    return f"{shown}..." if len(text) > most else shown


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean '...'? " with the nearest of the known names; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'? " if near else ""
