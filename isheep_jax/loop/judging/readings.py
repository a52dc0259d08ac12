"""How a judge's opinion of a pair is read, an entry of `READINGS` each: what it asks, what it cannot see.

A reading gives one number per pair, and higher is better. It knows no run directory: the stage `assess`, the check of a
judge and measurements on published pairs all call `read`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from isheep_jax.loop.filters.blind_spots import BREAKS_OFF, ECHO, HALF_ECHO, LOOP, NO_PUNCTUATION, POLITE, blind_spot
from isheep_jax.loop.judging.asked_once import AskedOnce
from isheep_jax.loop.judging.comparisons import read_pairwise, read_self_consistency
from isheep_jax.loop.judging.likelihoods import read_backward_lift, read_ending, read_lift, read_likelihood
from isheep_jax.loop.judging.reader import Candidate, Opinion, Reader, Reading
from isheep_jax.loop.judging.rubric import read_rubric
from isheep_jax.loop.records import KEPT, ReadingValue, Scores, Verdict, dropped

# The reason of a pair for which a reading has no value.
UNSCORED = "unscored"

# Text that was copied, or that goes round and round, is likely whatever it says.
_COPIES = frozenset({ECHO, HALF_ECHO, LOOP})
# The likelihood of what is there says little of what is missing.
_MISSING = frozenset({BREAKS_OFF, NO_PUNCTUATION})

READINGS: dict[str, Reading] = {
    "rubric": Reading("scores from 1 to 10", read_rubric, needs_weights=False),
    # The two lifts see what a response is about, which likelihood and ending do not.
    "lift": Reading(
        "how much likelier the instruction makes the response", read_lift, blind_to=_COPIES | _MISSING, weight=2.0
    ),
    "backward_lift": Reading(
        "how much likelier the response makes the instruction",
        read_backward_lift,
        blind_to=_COPIES | _MISSING,
        weight=2.0,
        templates=("backward",),
    ),
    "likelihood": Reading("how likely the response is", read_likelihood, blind_to=_COPIES | _MISSING | {POLITE}),
    "ending": Reading("how likely the response ends where it does", read_ending, blind_to=_COPIES | {POLITE}),
    "self_consistency": Reading(
        "how far the other responses to the instruction agree",
        read_self_consistency,
        blind_to=_COPIES | {POLITE},
        needs_weights=False,
        needs_others=True,
    ),
    "pairwise": Reading(
        "how often the response is preferred to the others",
        read_pairwise,
        needs_others=True,
        templates=("pairwise",),
    ),
}

# Together these find the damages of the check on both small models that it was measured on (docs/judging.md).
TOGETHER = ("lift", "backward_lift", "likelihood", "ending")


def read(reader: Reader, candidates: Sequence[Candidate]) -> Iterator[tuple[int, Scores]]:
    """Yields what the judge says of each pair with the pair's index, in any order.

    A pair for which a reading has no value is "unscored"; one in a reading's blind spot is dropped with the reason.
    """
    names = reader.settings.readings
    if len(names) > 1:
        reader = dataclasses.replace(reader, judge=AskedOnce(reader.judge))
    opinions: list[dict[str, Opinion]] = [{} for _ in candidates]
    for name in names:
        for i, opinion in READINGS[name].read(reader, candidates):
            opinions[i][name] = opinion
            if len(opinions[i]) == len(names):
                yield i, _scores(candidates[i], opinions[i])


def _scores(candidate: Candidate, opinions: Mapping[str, Opinion]) -> Scores:
    rubric = opinions.get("rubric", {})
    readings = {name: opinion for name, opinion in opinions.items() if isinstance(opinion, ReadingValue)}
    return Scores(
        candidate.id,
        rubric.get("quality"),
        rubric.get("following"),
        _verdict(candidate, opinions),
        readings or None,
    )


def _verdict(candidate: Candidate, opinions: Mapping[str, Opinion]) -> Verdict:
    values = {}
    for name, opinion in opinions.items():
        values |= {name: opinion} if isinstance(opinion, ReadingValue) else opinion
    missing = [name for name, opinion in values.items() if opinion.value is None]
    if missing:
        return dropped(UNSCORED, ", ".join(missing))
    unseen = frozenset().union(*(READINGS[name].blind_to for name in opinions))
    reason = blind_spot(unseen, candidate.instruction, candidate.input, candidate.response)
    return dropped(reason) if reason else KEPT
