"""The benchmark's figures as a table for the terminal and as JSON."""

import dataclasses
from dataclasses import dataclass, field

from isheep_jax.speed.ceilings import Ceilings
from isheep_jax.speed.decoding import Speed
from isheep_jax.speed.quantization_error import QuantizationError

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
    """One run of the benchmark. devices, model, dtype: names to print. quantization_error: None without int8."""

    devices: str
    model: str
    dtype: str
    ceilings: Ceilings
    quantization_error: QuantizationError | None
    speeds: list[Speed] = field(default_factory=list)

    def opening(self) -> list[str]:
        """Returns the lines above the table, and its header."""
        lines = [
            f"{self.model}, {self.dtype}, on {self.devices}",
            f"ceilings: products {self.ceilings.flops / 1e9:,.0f} GFLOP/s at the model's shapes, copy "
            f"{self.ceilings.bandwidth / 1e9:,.1f} GB/s read and written",
        ]
        if self.quantization_error is not None:
            q = self.quantization_error
            lines.append(
                f"int8 against {self.dtype}, on {q.tokens:,} tokens of the model's own completions: the same most "
                f"probable token {q.agreement:.2%}, KL divergence {q.divergence:.5f} nats per token"
            )
        return [*lines, "", _ROW.format(*_TITLES)]

    def row(self, speed: Speed) -> str:
        """Returns a workload's row of the table."""
        generates = speed.slots > 0
        return _ROW.format(
            speed.workload,
            speed.requests,
            speed.slots if generates else "-",
            f"{speed.requests / speed.seconds:.2f}",
            f"{(speed.prompt_tokens + speed.new_tokens) / speed.seconds:,.0f}",
            f"{speed.fraction:.0%}",
            f"{speed.statistics.occupancy:.0%}" if generates else "-",
            f"{1e3 * speed.idle_per_call:.1f} ms, {speed.idle_share:.1%}" if generates else "-",
            speed.compilations,
        )

    def as_dict(self) -> dict:
        """Returns the figures as JSON values."""
        return {
            "devices": self.devices,
            "model": self.model,
            "dtype": self.dtype,
            "ceilings": dataclasses.asdict(self.ceilings),
            "quantization_error": self.quantization_error and dataclasses.asdict(self.quantization_error),
            "workloads": [speed.as_dict() for speed in self.speeds],
        }
