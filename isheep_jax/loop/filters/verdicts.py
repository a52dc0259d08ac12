"""The verdict on a completion before any other rule, and the reasons that more than one module looks at."""

from isheep_jax.decode.requests import Completion
from isheep_jax.loop.records import KEPT, Verdict, dropped

NOT_DECODED = "not decoded"
UNFINISHED = "unfinished"
EMPTY = "empty"
NO_THOUGHTS = "no thoughts"
NO_ANSWER = "no answer"
NOT_NEW = "not new"
IN_EVALUATION_SET = "in an evaluation set"


def not_decoded(completion: Completion) -> Verdict | None:
    """Returns the verdict on a completion whose prompt the model could not take; None for all others."""
    return dropped(NOT_DECODED, completion.error) if completion.finish_reason == "error" else None


def verdict_of(completion: Completion, reason: str | None) -> Verdict:
    """Returns the verdict on a completion as a whole: not decoded, unfinished, dropped for the reason, or kept.

    Args:
        completion: What the model wrote.
        reason: Why its text is dropped if it is complete; None or "" to keep it.
    """
    if verdict := not_decoded(completion):
        return verdict
    if completion.finish_reason == "length":
        return dropped(UNFINISHED)
    return dropped(reason) if reason else KEPT
