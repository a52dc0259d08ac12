"""Makes the standard streams of a command fit for any terminal, log and pipe.

Characters that the terminal's encoding lacks are replaced. Output that cannot be written (a full disk, a reader that
has gone, a stream that was closed from the start) is an `OutputError` of one line.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from typing import Any

from isheep_jax.errors import UserError


class OutputError(UserError):
    """Standard output cannot be written."""


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        with _as_output_error():
            return super().write(text)

    def flush(self) -> None:
        with _as_output_error():
            super().flush()


def prepare(streams: Any) -> None:
    """Replaces the standard streams of the module `streams`, which is `sys`."""
    _fill_closed()
    if streams.stdin is None:
        streams.stdin = open(0, closefd=False)  # noqa: SIM115
    if streams.stderr is None:
        streams.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if streams.stdout is None:
        # Descriptor 1 cannot be written now, so that the first line is refused.
        streams.stdout = _Output(io.BufferedWriter(io.FileIO(os.dup(1), "wb")), encoding="utf-8", errors="replace")
    else:
        old = streams.stdout
        settings = {"line_buffering": old.line_buffering, "write_through": old.write_through}
        streams.stdout = _Output(old.detach(), encoding=old.encoding, errors="replace", **settings)
    streams.__stdout__ = streams.stdout


def discard_output(stdout: Any) -> None:
    """Lets standard output, and what its buffer still has, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _fill_closed() -> None:
    """Takes the descriptors of streams that were closed: a file that got one of them would hold a library's output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest one that is free. What is written to standard output then is an error, as with a closed one.
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)


@contextlib.contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is closed" if error.errno in (errno.EPIPE, errno.EBADF) else error.strerror or error
        raise OutputError(f"standard output cannot be written: {reason}") from error
