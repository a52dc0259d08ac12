"""The figures of an iteration, for the console and `summary.json`, and which iteration is the best so far."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isheep_jax.config import StopConfig

# Figures of a task's result that belong in the summary; the rest stays in evaluation.json.
_HEADLINE = ("accuracy", "loss", "stderr", "count")


@dataclass(frozen=True)
class IterationSummary:
    """The figures of one iteration; None where the base model (iteration 0) or the settings have none.

    iteration: number; 0 is the base model.
    instructions: how many were kept.
    kept: pairs that were selected.
    mean_quality, mean_following: mean scores (1 to 10) over all scored pairs.
    kept_quality, kept_following: mean scores over the selected pairs.
    readings: {reading: {"mean", "kept"}}, mean final values over all pairs and over the selected ones; None where the
        scores say it all.
    kept_characters: mean length of the selected responses.
    ended: share of the responses that came to an end before `respond.max_tokens` (0 to 1).
    train_loss, validation_loss: of the fine-tuning (nats per loss token).
    novelty: share of the well-formed instructions that were new (0 to 1).
    per_thousand_tokens: instructions that were kept per thousand new tokens of their prompts.
    score_mass: median probability that the judge gave to the ten scores together.
    judge_check: how well the judge tells good responses from damaged ones, where this iteration checked it.
    evaluation: {task: {"accuracy" or "loss", "stderr", "count"}} of the iteration's model.
    agreement: how far a second judge agrees, with `assess.agreement`.
    second_turn: {"instructions", "kept"}, with `synthesize.turns=2`.
    engraved: evaluation of the model that wrote the thorough answers, with `clone.enabled`.
    thorough: how many of these were kept.
    """

    iteration: int
    instructions: int | None = None
    kept: int | None = None
    mean_quality: float | None = None
    mean_following: float | None = None
    kept_quality: float | None = None
    kept_following: float | None = None
    readings: Mapping[str, Mapping[str, float]] | None = None
    kept_characters: float | None = None
    ended: float | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    novelty: float | None = None
    per_thousand_tokens: float | None = None
    score_mass: float | None = None
    judge_check: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    agreement: Mapping[str, Any] | None = None
    second_turn: Mapping[str, int] | None = None
    engraved: Mapping[str, Mapping[str, float]] | None = None
    thorough: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what `summary.json` holds."""
        return dataclasses.asdict(self)

    def value(self, measure: str) -> float | None:
        """Returns "accuracy" (mean over the tasks) or "validation_loss"; None where it was not measured."""
        return self.validation_loss if measure == "validation_loss" else mean_accuracy(self.evaluation)


def headline(evaluation: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns those figures of each task that belong in a summary."""
    return {task: {name: result[name] for name in _HEADLINE if name in result} for task, result in evaluation.items()}


def mean_accuracy(evaluation: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Returns the mean accuracy (0 to 1) over the tasks; None without one."""
    accuracies = [result["accuracy"] for result in evaluation.values() if "accuracy" in result]
    return sum(accuracies) / len(accuracies) if accuracies else None


def mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are known, to four places; None without any."""
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 4) if known else None


def best_iteration(summaries: Sequence[IterationSummary], settings: StopConfig) -> dict[str, Any] | None:
    """Returns the best iteration so far as {"iteration", "measure", "value"}, the earliest of equals; None if unknown.

    With stop.measure=none the accuracy decides, or else the validation loss. The base model (iteration 0) takes part
    where it was measured.
    """
    for measure in ("accuracy", "validation_loss") if settings.measure == "none" else (settings.measure,):
        values = {s.iteration: v for s in summaries if (v := s.value(measure)) is not None}
        if values:
            sign = -1 if measure == "accuracy" else 1
            number = min(values, key=lambda n: (sign * values[n], n))
            return {"iteration": number, "measure": measure, "value": round(values[number], 6)}
    return None


def has_stopped_improving(summaries: Sequence[IterationSummary], settings: StopConfig) -> bool:
    """Returns whether the last `stop.patience` iterations brought nothing better than what was there before them."""
    if settings.measure == "none":
        return False
    best = best_iteration(summaries, settings)
    return best is not None and summaries[-1].iteration - best["iteration"] >= settings.patience
