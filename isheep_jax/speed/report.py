"""The benchmark's figures as text and as JSON."""

import dataclasses
from dataclasses import dataclass, field

from isheep_jax.speed.ceilings import Ceilings
from isheep_jax.speed.decoding import Speed
from isheep_jax.speed.quantization_error import Quality

_TITLES = (
    "workload",
    "requests",
    "slots",
    "requests/s",
    "tokens/s",
    "of the limit",
    "slots busy",
    "host gap",
    "compiled",
)
_ROW = "{:<12}{:>9}{:>7}{:>12}{:>11}{:>14}{:>12}{:>18}{:>10}"


@dataclass
class Report:
    """One run of the benchmark. devices, model, dtype: in words."""

    devices: str
    model: str
    dtype: str
    ceilings: Ceilings
    quality: Quality | None
    speeds: list[Speed] = field(default_factory=list)

    def opening(self) -> list[str]:
        """What does not depend on the workloads, and the head of the table."""
        lines = [
            f"{self.model}, {self.dtype}, on {self.devices}",
            f"ceilings: products {self.ceilings.flops / 1e9:,.0f} GFLOP/s at the model's shapes, copy "
            f"{self.ceilings.bandwidth / 1e9:,.1f} GB/s read and written",
        ]
        if self.quality is not None:
            q = self.quality
            lines.append(
                f"int8 against {self.dtype}, on {q.tokens:,} tokens of the model's own: the same most probable token "
                f"{q.agreement:.2%}, KL divergence {q.divergence:.5f} nats per token"
            )
        return [*lines, "", _ROW.format(*_TITLES)]

    def lines(self, speed: Speed) -> list[str]:
        """A row of the table."""
        generates = speed.slots > 0
        return [
            _ROW.format(
                speed.workload,
                speed.requests,
                speed.slots if generates else "-",
                f"{speed.requests / speed.seconds:.2f}",
                f"{(speed.prompt_tokens + speed.new_tokens) / speed.seconds:,.0f}",
                f"{speed.fraction:.0%}",
                f"{speed.statistics.occupancy:.0%}" if generates else "-",
                f"{1e3 * speed.idle_per_chunk:.1f} ms, {speed.idle:.1%}" if generates else "-",
                speed.compilations,
            )
        ]

    def as_dict(self) -> dict:
        return {
            "devices": self.devices,
            "model": self.model,
            "dtype": self.dtype,
            "ceilings": dataclasses.asdict(self.ceilings),
            "quality": None if self.quality is None else dataclasses.asdict(self.quality),
            "workloads": [speed.as_dict() for speed in self.speeds],
        }
