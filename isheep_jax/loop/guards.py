"""Warns the user, or ends the run, when a measure of an iteration falls below its limit."""

from collections.abc import Sequence

from isheep_jax.config import GuardConfig
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.filters.verdicts import NOT_NEW
from isheep_jax.loop.protocols import Reporter
from isheep_jax.loop.records import Instruction

# What is too low, by the name of the limit.
_MESSAGES = {
    "min_novelty": "only {:.3f} of the well-formed instructions are new",
    "min_score_mass": "the judge gives the ten scores a median probability of only {:.3f}",
    "min_yield": "only {:.3f} of synthesize.instructions is kept",
}


def check(
    guard: GuardConfig,
    name: str,
    value: float | None,
    *,
    hint: str,
    iteration: int,
    fresh: bool,
    reporter: Reporter,
) -> None:
    """Compares a measured share with its limit, guard.NAME.

    Args:
        guard: The limits, and what happens below them.
        name: Name of the limit.
        value: The measured share; None if it is not known.
        hint: What may raise the share.
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
    message = f"iteration {iteration}: {_MESSAGES[name].format(value)}; {hint}"
    if guard.action == "stop":
        raise NothingLeftError(
            f"{message}; with a lower guard.{name} (now {limit:g}) or guard.action=warn the run goes on"
        )
    if fresh:
        reporter.warn(message)


def novelty(records: Sequence[Instruction]) -> float | None:
    """Returns the share of the well-formed instructions that were new; None if none was compared."""
    kept = sum(r.verdict.kept for r in records)
    compared = kept + sum(r.verdict.reason == NOT_NEW for r in records)
    return round(kept / compared, 4) if compared else None
