"""Notices a judge whose judgments have no score, before it is paid for all of them."""

from collections.abc import Callable

from isheep_jax.errors import UserError, quoted
from isheep_jax.loop.judging.readings import UNSCORED
from isheep_jax.loop.records import Scores

# Pairs after which it is looked at, and characters of a judgment that are shown.
FIRST = 20
_SHOWN = 80


class Unread:
    """Counts the first pairs of a stage that have no score."""

    def __init__(self, warn: Callable[[str], None], *, server: bool):
        """Begins to count.

        warn: gets one line where most of the first pairs have no score. server: whether the judge is one, which is not
        asked further where none of them has a score.
        """
        self._warn, self._server = warn, server
        self._seen = self._unread = 0
        self._shown = ""

    def take(self, scores: Scores) -> None:
        """Takes what the judge says of the next pair. Raises UserError where a server gives no score at all."""
        if self._seen == FIRST:
            return
        self._seen += 1
        if scores.verdict.reason == UNSCORED:
            self._unread += 1
            self._shown = self._shown or _reason(scores)
        if self._seen == FIRST:
            self._decide()

    def end(self) -> None:
        """Ends the count where there were fewer pairs. Raises UserError as `take`."""
        if 0 < self._seen < FIRST:
            self._decide()

    def _decide(self) -> None:
        shown = f", such as '{self._shown}'" if self._shown else ""
        if self._server and self._unread == self._seen:
            raise UserError(
                f"--assess.judge: none of the judgments of the first {self._seen} pairs begins with a score{shown}; "
                "name another --assess.judge_model, or give it more --assess.max_tokens"
            )
        if self._unread > self._seen / 2:
            self._warn(f"{self._unread} of the first {self._seen} pairs have no score of the judge{shown}")


def _reason(scores: Scores) -> str:
    """Returns a judgment without a score, or why there is none, on one short line."""
    texts = [score.text for score in (scores.quality, scores.following) if score and score.value is None]
    texts += [value.error for value in (scores.readings or {}).values() if value.value is None]
    return quoted(" ".join(next(filter(None, texts), "").split()), _SHOWN)
