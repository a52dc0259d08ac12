"""The verdict on a completion before any other rule, and the reasons that more than one module looks at."""

import re

from isheep_jax.decode.requests import Completion
from isheep_jax.loop.records import KEPT, Verdict, dropped

NOT_DECODED = "not decoded"
UNFINISHED = "unfinished"
EMPTY = "empty"
NO_THOUGHTS = "no thoughts"
NO_ANSWER = "no answer"
NOT_NEW = "not new"
IN_EVALUATION_SET = "in an evaluation set"
CUT = "cut at a stop string"

# An end that announces what comes next.
_ANNOUNCES = re.compile(r"[:：,，]\W*$")
# Texts in which the label of a turn or of a question belongs to the answer.
_HAS_LABELS = re.compile(
    r"\b(dialog(ue)?s?|conversations?|quiz(zes)?|q\s?&\s?a|faqs?|interviews?|transcripts?|chat(\s?logs?|s)?|scripts?|"
    r"questions? and (their |its |the )?answers?)\b",
    re.IGNORECASE,
)


def not_decoded(completion: Completion) -> Verdict | None:
    """Returns the verdict on a completion whose prompt the model could not take; None for all others."""
    return dropped(NOT_DECODED, completion.error) if completion.finish_reason == "error" else None


def cut_reason(completion: Completion, task: str, text: str) -> str | None:
    """Returns why an answer that a stop string ended is dropped, or None.

    A base model ends its answer with the label of the next turn. Where the task asks for a text with such labels, or
    the answer announces one, the same label is the middle of the answer.

    task: what was asked; "" for none. text: what is kept of the completion.
    """
    if not completion.stop:
        return None
    is_label = completion.stop.rstrip().endswith((":", "："))
    return CUT if _ANNOUNCES.search(text[-80:]) or (is_label and _HAS_LABELS.search(task)) else None


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
