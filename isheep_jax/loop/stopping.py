"""Which iteration is the best, and whether another one is worth its time."""

from collections.abc import Sequence

from isheep_jax.config import StopConfig


def value(row: dict, measure: str) -> float | None:
    """accuracy: mean over the benchmarks; validation_loss: as it is. None where it was not measured."""
    if measure == "validation_loss":
        return row.get("validation_loss")
    accuracies = [result["accuracy"] for result in row.get("evaluation", {}).values() if "accuracy" in result]
    return sum(accuracies) / len(accuracies) if accuracies else None


def best(rows: Sequence[dict], settings: StopConfig) -> dict | None:
    """The best iteration so far as {"iteration", "measure", "value"}, the earliest of equals; None without a measure.

    With stop.measure=none it is the accuracy that decides, or else the validation loss. The base model (iteration 0)
    takes part where it was measured.
    """
    for measure in ("accuracy", "validation_loss") if settings.measure == "none" else (settings.measure,):
        values = {row["iteration"]: v for row in rows if (v := value(row, measure)) is not None}
        if values:
            sign = -1 if measure == "accuracy" else 1
            number = min(values, key=lambda n: (sign * values[n], n))
            return {"iteration": number, "measure": measure, "value": round(values[number], 6)}
    return None


def finished(rows: Sequence[dict], settings: StopConfig) -> bool:
    """Whether the last `stop.patience` iterations brought nothing better than what was there before them."""
    if settings.measure == "none":
        return False
    found = best(rows, settings)
    return found is not None and rows[-1]["iteration"] - found["iteration"] >= settings.patience
