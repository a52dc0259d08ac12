"""What tells a person, or ends the run, when an iteration has collapsed."""

from collections.abc import Sequence

from isheep_jax.config import GuardConfig
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.protocols import Reporter
from isheep_jax.loop.records import Instruction

_SAYS = {
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

    fresh: whether the stage was made just now; a person is warned once. Raises NothingLeftError below the limit with
    guard.action=stop, each time: what is in the run directory stays, and a lower limit goes on from it.
    """
    limit = getattr(guard, name)
    if value is None or value >= limit or guard.action == "off":
        return
    said = f"iteration {iteration}: {_SAYS[name].format(value)}"
    if guard.action == "stop":
        raise NothingLeftError(
            f"{said}; with a lower guard.{name} (now {limit:g}) or guard.action=warn the run goes on"
        )
    if fresh:
        reporter.warn(said)


def novelty(records: Sequence[Instruction]) -> float | None:
    """Share of the well-formed instructions that were new; None where none was compared."""
    kept = sum(r.verdict.kept for r in records)
    compared = kept + sum(r.verdict.reason == "not new" for r in records)
    return round(kept / compared, 4) if compared else None
