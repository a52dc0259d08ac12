"""Figures of what a process and its devices did for a stage: how busy slots were, padding, host, loading, compiling."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isheep_jax.decode.statistics import Statistics
from isheep_jax.runtime.compilations import Compilations, compilations


@dataclass
class Meter:
    """Sums over the life of a process.

    past: what engines that are gone have counted. engine: counts of the one that is there; None: there is none.
    load_seconds: time in which weights were read and placed.
    """

    past: Statistics = field(default_factory=Statistics)
    engine: Statistics | None = None
    load_seconds: float = 0.0

    def __post_init__(self):
        compilations()  # counts from here on

    def take(self, engine: Statistics | None) -> None:
        """Counts another engine from now on, or none."""
        self.past, self.engine = self._decoded(), engine

    def start(self) -> Callable[[], Mapping[str, float]]:
        """Starts to measure; see `loop.protocols.Backend.meter`."""
        before, compiled, loaded = self._decoded(), compilations(), self.load_seconds
        return lambda: _figures(self._decoded() - before, compilations() - compiled, self.load_seconds - loaded)

    def _decoded(self) -> Statistics:
        return self.past + self.engine if self.engine else copy.copy(self.past)


def _figures(decoded: Statistics, compiled: Compilations, load_seconds: float) -> dict[str, float]:
    """Returns the figures of a stage; see docs/tpu.md."""
    found: dict[str, float] = {}
    if decoded.steps:
        found["decode_steps"] = decoded.steps
        found["slots_busy"] = round(decoded.occupancy, 4)
        found["sampled_tokens"] = decoded.sampled_tokens
        found["host_seconds_per_call"] = round(decoded.host_seconds / decoded.calls, 4)
        found["host_share"] = round(decoded.host_seconds / max(decoded.generate_seconds, 1e-9), 4)
        found["idle_share"] = round(decoded.idle_seconds / max(decoded.generate_seconds, 1e-9), 4)
    if decoded.prompt_tokens:
        found["prompt_tokens"] = decoded.prompt_tokens
        found["positions_per_prompt_token"] = round(1 / decoded.packing, 4)
    if load_seconds:
        found["load_seconds"] = round(load_seconds, 3)
    if compiled.programs:
        found["compiled_programs"] = compiled.compiled.total()
        found["cached_programs"] = compiled.cached.total()
        found["compile_seconds"] = round(compiled.seconds, 3)
    return found
