"""Counts the units of a stage, and says how many are finished, how fast, and how much time is left."""

import math
import time
from collections.abc import Callable


class StageProgress:
    """Counts a stage's units and estimates its rate."""

    def __init__(self, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic):
        self.total = total  # None until the work says
        self.unit = unit
        self.done = 0
        self.notes: dict[str, object] = {}
        self.changed: Callable[[], None] = lambda: None
        self._clock = clock
        self._start = clock()
        self._first: tuple[float, int] | None = None

    def advance(self, n: int = 1, **notes: object) -> None:
        """Adds `n` finished units; notes are shown next to the count."""
        self.done += n
        self.notes |= notes
        if self._first is None:
            # The rate leaves out what an earlier process finished and the wait for the compiler.
            self._first = (self._clock(), self.done)
        self.changed()

    def update(self, done: int, total: int, **notes: object) -> None:
        """Sets how many of how many units are done, for work whose total is known only when it runs."""
        self.total = total
        self.advance(done - self.done, **notes)

    @property
    def rate(self) -> float:
        """Units per second since the first report; 0 while unknown."""
        if self._first is None:
            return 0.0
        seconds = self._clock() - self._first[0]
        return (self.done - self._first[1]) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        """Returns the state in the middle of the stage: count, rate, time left."""
        rate = self.rate
        pace = f", {rate:.3g}/s, {duration((self.total - self.done) / rate)} left" if rate > 0 and self.total else ""
        total = "?" if self.total is None else self.total
        return f"{self.done}/{total} {self.unit}{pace}{self._notes()}"

    def ending(self) -> str:
        """Returns the state after the stage: count and duration."""
        return f"{self.done} {self.unit} in {duration(self._clock() - self._start)}{self._notes()}"

    def _notes(self) -> str:
        if not self.notes:
            return ""
        facts = (f"{k.replace('_', ' ')} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in self.notes.items())
        return f" ({', '.join(facts)})"


def duration(seconds: float) -> str:
    """Returns a duration in words: 1.2 s, 42 s, 3 min 20 s, 1 h 5 min."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
