"""Warns the user, or ends the run, when a measure of an iteration falls below its limit."""

from collections.abc import Sequence

from isheep_jax.config import GuardConfig
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.protocols import Reporter
from isheep_jax.loop.records import Instruction

_MESSAGES = {
    "min_novelty": (
        "only {:.3f} of the well-formed instructions are new; more seeds or a higher synthesize.temperature help"
    ),
    "min_score_mass": (
        "the judge gives the ten scores a median probability of only {:.3f}; the scoring prompts may not suit it"
    ),
    "min_yield": (
        "only {:.3f} of synthesize.instructions is kept; lower select.threshold or use select.rule=top_fraction for "
        "more"
    ),
}


def check(guard: GuardConfig, name: str, value: float | None, iteration: int, fresh: bool, reporter: Reporter) -> None:
    """Compares a measured share with its limit, guard.NAME.

    Args:
        guard: The limits, and what happens below them.
        name: Name of the limit.
        value: The measured share; None if it is not known.
        iteration: Number of the iteration.
        fresh: Whether this process has made the stage; only then the user is warned.
        reporter: Shows the warning.

    Raises:
        NothingLeftError: The share is below its limit and guard.action is 'stop'. The run directory stays as it is, and
            the run resumes with a lower limit.
    """
    limit = getattr(guard, name)
    if value is None or value >= limit or guard.action == "off":
        return
    message = f"iteration {iteration}: {_MESSAGES[name].format(value)}"
    if guard.action == "stop":
        raise NothingLeftError(
            f"{message}; with a lower guard.{name} (now {limit:g}) or guard.action=warn the run goes on"
        )
    if fresh:
        reporter.warn(message)


def novelty(records: Sequence[Instruction]) -> float | None:
    """Returns the share of the well-formed instructions that were new; None if none was compared."""
    kept = sum(r.verdict.kept for r in records)
    compared = kept + sum(r.verdict.reason == "not new" for r in records)
    return round(kept / compared, 4) if compared else None
