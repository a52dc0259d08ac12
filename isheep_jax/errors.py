"""The exceptions whose message is one line for the user, and what such lines are made of."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line that names the setting or file and what would be right.

    Commands print it to stderr without a traceback and exit with code 2.
    """


class NothingLeftError(UserError):
    """The input is good, but the run has no data left: the model writes nothing new, or too little is kept."""


def one_line(error: Exception) -> str:
    """Returns an exception's message without line breaks, to be quoted in a `UserError`."""
    return " ".join(str(error).split())


def quoted(value: object, most: int = 80) -> str:
    """Returns a value out of a file for a message: at most so many characters, none of which a terminal acts on."""
    text = value if isinstance(value, str) else repr(value)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return f"{shown}..." if len(text) > most else shown


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean '...'? " with the nearest of the known names; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'? " if near else ""
