"""Prints lines that may hold text of models, files and servers: nothing in them controls the terminal."""

import sys
from typing import TextIO

from isheep_jax.errors import printable


def show(text: str = "", *, stream: TextIO | None = None) -> None:
    """Prints lines at once. stream: None: standard output."""
    print(printable(text), file=stream, flush=True)


def as_data(text: str) -> str:
    """Returns a model's text for standard output: as it is in a file or a pipe, harmless on a terminal."""
    return printable(text, most=None) if sys.stdout.isatty() else text
