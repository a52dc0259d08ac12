"""Runs a command's `main`, and reports an error in one line with an exit code."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from isheep_jax.cli import signals
from isheep_jax.cli.output import show
from isheep_jax.cli.streams import OutputError, discard_output
from isheep_jax.config import Config, flatten
from isheep_jax.errors import UserError, one_line

_OUT_OF_MEMORY = (
    "out of memory: lower decode.slots, decode.max_length, sft.batch_size or sft.sequence_length, or use more devices; "
    "python -m isheep_jax.plan says what fits"
)
# Characters of another library's message.
_QUOTED = 120


def run_command(main: Callable[[list[str]], None], module: str) -> int:
    """Runs a command's `main` on the command line; returns the exit code (2: bad input).

    A signal ends the process with 128 + its number, such as 130 for Ctrl-C.
    """
    arguments = sys.argv[1:]
    try:
        Path.cwd()
    except OSError:
        return _fail("the working directory is gone: change to one that is there")
    # transformers is here for its tokenizers: its warning that there is no PyTorch would only confuse.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with signals.patiently(module, arguments):
        try:
            _run_and_flush(main, arguments)
            return 0
        except BaseException as error:
            code = report_error(error, module, arguments)
            if code is None:
                raise
            return code


def _run_and_flush(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def report_error(error: BaseException, module: str, arguments: Sequence[str]) -> int | None:
    """Prints an error in one line and returns the exit code; None for an error that needs a traceback.

    A process that a signal has stopped ends here.
    """
    signals.end_if_stopped()
    if isinstance(error, OutputError):
        # Python would try once more, and complain, when it ends.
        discard_output(sys.stdout)
        return _fail(f"{error}; {signals.how_to_go_on(module, arguments)}")
    if isinstance(error, UserError):
        return _fail(str(error))
    if isinstance(error, KeyboardInterrupt):
        _print(signals.stop_line(signal.SIGINT, module, arguments))
        return 128 + signal.SIGINT
    if isinstance(error, OSError) and error.filename is not None:
        return _fail(f"{error.filename}: {error.strerror}")
    if disk_is_full(error):
        again = signals.how_to_go_on(module, arguments)
        return _fail(f"no space left on a disk ({one_line(error)[:_QUOTED]}); free some, and {again}")
    if memory_is_full(error):
        return _fail(f"{_OUT_OF_MEMORY} ({one_line(error)[:_QUOTED]})")
    return None


def without_sections(message: str, *sections: str) -> str:
    """Returns a message with the names that settings of these sections have on a command line without sections.

    What only begins like one, such as the name of a file, is left alone.
    """
    names = "|".join(re.escape(name) for name in flatten(Config()) if name.startswith(tuple(f"{s}." for s in sections)))
    return re.sub(rf"(--|(?<![/.\w-]))({names})(?![\w-]|\.\w)", lambda name: f"--{name[2].partition('.')[2]}", message)


def memory_is_full(error: BaseException) -> bool:
    """Returns whether the devices, or the machine, have less memory than was asked for."""
    # By its name: most commands that end early have not imported jax.
    is_xla = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return is_xla or isinstance(error, MemoryError)


def disk_is_full(error: BaseException) -> bool:
    """Returns whether `error`, or one that led to it, says that a disk is full (libraries wrap such errors)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, OutputError):
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str) -> int:
    _print("error: " + " ".join(message.split()))
    return 2


def _print(line: str) -> None:
    with contextlib.suppress(OSError):
        show(line, stream=sys.stderr)
