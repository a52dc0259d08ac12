"""Ends a command that gets SIGINT, SIGTERM or SIGHUP: in time, with one line and exit code 128 + the signal's number.

The first signal is raised as an exception, so that the command can put away what is temporary. Python does this between
two steps of the main thread only, which may be busy for minutes (compiling), and libraries may lose an exception (in a
callback). Therefore a thread watches, too: after `PATIENCE` seconds, or when a second signal comes, it ends the process
as it is. Files are whole at any instant, so that nothing is lost.

Work in steps (`stopping`) is let come to the end of a step and save its state, for which it has longer.
"""

import contextlib
import logging
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from isheep_jax import stopping
from isheep_jax.stopping import Stopped

# Seconds that a command has to put away its things. Schedulers wait at least 10 until they kill.
PATIENCE = 5.0
# Seconds that work in steps has to save its state. Spot machines, and Kubernetes by default, wait 30 until they kill.
PATIENCE_TO_SAVE = 25.0

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
# Commands that keep what they have done.
_RESUMED = frozenset(f"isheep_jax.{name}" for name in ("train", "evaluate", "study", "fetch"))


def running_command() -> str | None:
    """Returns the name of the module of this package that was started with `python -m`; None if none was."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec and spec.name.startswith(f"{__package__.partition('.')[0]}.") else None


def command_line(module: str, arguments: Sequence[str]) -> str:
    """Returns the command as the user would type it again."""
    return shlex.join(["python", "-m", module, *arguments])


def _keeps(module: str, arguments: Sequence[str]) -> bool:
    """Returns whether a command keeps what it has done; `generate` does with a file as its output."""
    writes_file = any(word.partition("=")[0] == "--output" for word in arguments)
    return module in _RESUMED or (module == "isheep_jax.generate" and writes_file)


def how_to_go_on(module: str, arguments: Sequence[str]) -> str:
    """Returns what the same command does once this one has ended early."""
    again = "goes on from here" if _keeps(module, arguments) else "starts again"
    return f"the same command {again}: {command_line(module, arguments)}"


def stop_line(number: int, module: str, arguments: Sequence[str]) -> str:
    """Returns the line that a command says when a signal ends it."""
    return " ".join(f"stopped by {_NAMES[number]}; {how_to_go_on(module, arguments)}".split())


class _Listener:
    """Waits for signals in a thread of its own.

    command: the module and the arguments, for the line.
    received: the signal that was raised.
    is_patient: whether a first signal is raised and waited for; otherwise it ends the process at once.
    interrupts_are_handled: whether Ctrl-C is for the conversation.
    """

    def __init__(self):
        self.command: tuple[str, Sequence[str]] = (running_command() or "", sys.argv[1:])
        self.received: int | None = None
        self.is_patient = False
        self.interrupts_are_handled = False
        self._ending = threading.Lock()
        self._signals, self._written = os.pipe()
        os.set_blocking(self._written, False)

    def start(self) -> None:
        """Takes the signals that are not ignored, as nohup and shells do for commands in the background."""
        signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        for number in _NAMES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._raise)
        report = sys.unraisablehook

        def hook(unraisable) -> None:
            if isinstance(unraisable.exc_value, Stopped):
                # A callback of a library has lost it: the same again, to the thread that ends the process at once.
                os.write(self._written, bytes([self.received]))
            elif self.received is None:
                report(unraisable)

        sys.unraisablehook = hook
        threading.Thread(target=self._watch, name="isheep_jax signals", daemon=True).start()

    def leave_signals(self) -> None:
        """Gives signals their usual effect again: what follows is the interpreter's end."""
        for number in _NAMES:
            if signal.getsignal(number) == self._raise:
                signal.signal(number, signal.SIG_DFL)

    def end(self, number: int) -> NoReturn:
        """Says why, and ends the process at once."""
        if self._ending.acquire(timeout=PATIENCE):
            with contextlib.suppress(Exception):
                line = stop_line(number, *self.command)
                # A process that has not imported it, or not wholly yet, has joined no others.
                distributed = sys.modules.get("isheep_jax.distributed")
                if hasattr(distributed, "leave"):
                    distributed.leave(lambda: _say(line), f"stopped by {_NAMES[number]}", 128 + number)
                _say(line)
        os._exit(128 + number)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.interrupts_are_handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.is_patient and self.received is None:
            self.received = number
            if stopping.is_deferred():
                stopping.note()
                return
            if _is_importing(frame):
                # Compiled modules print a traceback of their own; and there is little to put away.
                self.end(number)
            # Threads of libraries report that the main thread has left them.
            logging.disable(logging.CRITICAL)
            threading.excepthook = lambda _: None
            raise Stopped

    def _watch(self) -> None:
        first = patience = None
        while True:
            ready, _, _ = select.select([self._signals], [], [], patience)
            number = os.read(self._signals, 1)[0] if ready else first
            if number not in _NAMES or (self.interrupts_are_handled and number == signal.SIGINT):
                continue
            if first or not self.is_patient:
                self.end(first or number)
            first, patience = number, PATIENCE_TO_SAVE if stopping.is_deferred() else PATIENCE


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _say(line: str) -> None:
    """Prints a line on standard error, unless that is stuck. Python's own streams may be locked by another thread."""
    show_cursor, new_line = b"\x1b[?25h", b"\n" if os.isatty(2) else b""
    with contextlib.suppress(OSError):
        if os.isatty(1) and select.select([], [1], [], 0)[1]:
            os.write(1, show_cursor)
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 1)[1]:
            os.write(2, new_line + line.encode("utf-8", "backslashreplace") + b"\n")


_listener: _Listener | None = None


def listen() -> None:
    """Begins to wait for signals; one that comes before `patiently` ends the process at once."""
    global _listener
    _listener = _Listener()
    _listener.start()


@contextlib.contextmanager
def patiently(module: str, arguments: Sequence[str]) -> Iterator[None]:
    """Raises `Stopped` in the context, a command's, for a first signal. At its end a process that was stopped ends."""
    if _listener is None:
        yield
        return
    _listener.command, _listener.is_patient = (module, arguments), True
    try:
        yield
    finally:
        end_if_stopped()
        _listener.leave_signals()


def end_if_stopped() -> None:
    """Ends the process, with the line, if a signal has been raised; whatever exception a library made of it."""
    if _listener is not None and _listener.received:
        _listener.end(_listener.received)


@contextlib.contextmanager
def interrupts_handled() -> Iterator[None]:
    """Leaves Ctrl-C to the context, as `KeyboardInterrupt`; the process does not end by it."""
    if _listener is None:
        yield
        return
    _listener.interrupts_are_handled = True
    try:
        yield
    finally:
        _listener.interrupts_are_handled = False
