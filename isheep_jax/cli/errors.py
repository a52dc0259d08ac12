"""Runs a command's `main`, and reports an error in one line with an exit code."""

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence

from isheep_jax.errors import UserError


def run_command(main: Callable[[list[str]], None], module: str) -> int:
    """Runs a command's `main` on the command line; returns the exit code (2: bad input, 130: Ctrl-C)."""
    arguments = sys.argv[1:]
    # transformers is here for its tokenizers: its warning that there is no PyTorch would only confuse.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        main(arguments)
        return 0
    except BaseException as error:
        code = report_error(error, module, arguments)
        if code is None:
            raise
        return code


def report_error(error: BaseException, module: str, arguments: Sequence[str]) -> int | None:
    """Prints an error in one line and returns the exit code; None for an error that needs a traceback."""
    if isinstance(error, UserError):
        return _fail(str(error))
    if isinstance(error, KeyboardInterrupt):
        print(f"\nstopped; the same command goes on from here: {command_line(module, arguments)}", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of the output has gone (as in `| head`): Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.filename is not None:
        return _fail(f"{error.filename}: {error.strerror}")
    return None


def without_sections(message: str, *sections: str) -> str:
    """Returns a message with the names that settings of these sections have on a command line without sections."""
    return re.sub(rf"(--)?\b({'|'.join(sections)})\.(?=[a-z])", "--", message)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """Returns the command as the user would type it again."""
    return shlex.join(["python", "-m", module, *arguments])


def disk_is_full(error: BaseException) -> bool:
    """Returns whether `error`, or one that led to it, says that a disk is full (libraries wrap such errors)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
