"""Counts the programs that this process compiles, and those that it takes from the cache of compiled programs."""

import threading
from collections import Counter
from dataclasses import dataclass, field

import jax

# Events of jax.monitoring. The second follows the first in the same thread where the program was in the cache.
_HIT = "/jax/compilation_cache/cache_hits"
_READY = "/jax/core/compile/backend_compile_duration"


@dataclass
class Compilations:
    """What a process has compiled. The difference of two counts is what happened in between.

    compiled, cached: programs by name, such as "jit(prefill)": those that were compiled, and those from the cache.
    seconds: time of both, summed over threads; that of tracing and lowering is not in it.
    """

    compiled: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def programs(self) -> int:
        """Programs that were compiled or taken from the cache."""
        return self.compiled.total() + self.cached.total()

    def __sub__(self, before: "Compilations") -> "Compilations":
        return Compilations(self.compiled - before.compiled, self.cached - before.cached, self.seconds - before.seconds)


class _Listener(threading.local):
    """Adds up events. Each thread knows whether its program was in the cache."""

    hit = False

    def on_event(self, event: str, **_: object) -> None:
        if event == _HIT:
            self.hit = True

    def on_duration(self, event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        if event == _READY:
            with _lock:
                (_total.cached if self.hit else _total.compiled)[fun_name] += 1
                _total.seconds += seconds
            self.hit = False


_lock = threading.Lock()
_total = Compilations()
_listener: _Listener | None = None


def compilations() -> Compilations:
    """Returns what this process has compiled since the first call, with which counting begins."""
    global _listener
    with _lock:
        if _listener is None:
            _listener = _Listener()
            jax.monitoring.register_event_listener(_listener.on_event)
            jax.monitoring.register_event_duration_secs_listener(_listener.on_duration)
        return Compilations(_total.compiled.copy(), _total.cached.copy(), _total.seconds)
