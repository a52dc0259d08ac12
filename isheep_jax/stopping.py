"""Lets work that goes in steps end between two of them when a signal comes, with all that it has done kept.

Elsewhere a signal is raised as `Stopped` wherever the main thread is. Importing this module imports little, because a
signal may come early.
"""

import contextlib
from collections.abc import Iterator
from typing import NoReturn


class Stopped(BaseException):
    """A signal asks the command to end. Handlers of errors let it pass, and so does the conversation's of Ctrl-C."""


class _Steps:
    """Work in steps.

    is_deferred: whether a signal is noted, and not raised.
    is_noted: whether one has been noted in this process.
    """

    def __init__(self):
        self.is_deferred = self.is_noted = False

    def is_asked_for(self, step: int) -> bool:
        """Returns whether to stop before a step: this process, or another one, has noted a signal.

        From the first call on signals are noted. All processes call it before the same steps, and none is more than two
        steps ahead of another.
        """
        from isheep_jax import distributed

        self.is_deferred = True
        return distributed.is_stop_agreed(step, self.is_noted)

    def leave(self) -> NoReturn:
        """Ends the work. Raises `Stopped` or, where another process has got the signal, waits for the end by it."""
        from isheep_jax import distributed

        while not self.is_noted:
            distributed.wait_for_all()
        raise Stopped


_steps = _Steps()


def is_deferred() -> bool:
    """Returns whether a signal is to be noted, and not to be raised."""
    return _steps.is_deferred


def note() -> None:
    """Notes a signal."""
    _steps.is_noted = True


@contextlib.contextmanager
def between_steps() -> Iterator[_Steps]:
    """Yields what tells whether to stop. At the end of the work, a signal that has been noted is raised."""
    try:
        yield _steps
    finally:
        _steps.is_deferred = False
    if _steps.is_noted:
        raise Stopped
