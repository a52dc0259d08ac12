"""Which scores are asked for, and how a score is read from a judge's answer (I-SHEEP section 3.2).

There are two ways. 'sampled' is the paper's: a judgment is sampled and the number it begins with is taken. 'expected'
takes the mean under the model's distribution over the ten numbers, by prefill alone: every judgment has a number, there
is no sampling noise, and there are fewer ties (Wang, Zhang & Choi 2025, arXiv 2503.03064: the mean beats single
judgments throughout).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion
from isheep_jax.loop.records import Score, Scores

CRITERIA = ("quality", "following")
# What follows a prompt for a score.
NUMBERS = tuple(f" {n}" for n in range(1, 11))

_LEADING_NUMBER = re.compile(
    # Before it: white space, marks of bold text, opening quotes and brackets, a colon after the prompt.
    r"[\s*_`\"'“‘«(\[:：]*(\d+)(\.\d+)?"
    # Not part of another number, a time, a date or a word (ASCII, because "8分" is a score), and not a percentage.
    r"(?![\d.,:]*\d)(?!\s*%)(?![A-Za-z])"
    # Not the first number of a range or a choice.
    r"(?!\s*(-|–|—|~|to|or)\s*\d)"
    # Out of ten, if it says out of what.
    r"(?!\s*(/|／|out\s+of|of)\s*(?!10(?!\d))\d)"
)
_AUTHORS_NUMBER = re.compile(r"\W*(\d+)(\.\d+)?")

# Prompts that ask for a single score of everything.
SINGLE = ("joint", "few_shot")


def criteria_of(settings: AssessConfig) -> dict[str, str]:
    """Returns the scores to ask for, as fields of `Scores`, each with the name of its template."""
    if "rubric" not in settings.readings:
        return {}
    if settings.prompt in SINGLE:
        return {"quality": settings.prompt}
    suffix = "" if settings.prompt == "standard" else f"_{settings.prompt}"
    return {criterion: criterion + suffix for criterion in CRITERIA if settings.level in (criterion, "both")}


def parse_score(text: str, parser: str = "strict") -> int | None:
    """Returns the number that a judgment begins with, rounded to a whole one; None unless it is from 1 to 10.

    parser: `assess.parser`. With both parsers "8||good" is 8 and "10/10" is 10, and "Score: 9", "0" and "2024 is" give
    None. 'strict' rounds halves up ("8.5" is 9) and gives None for "-3" and "1-10 scale: 9". 'paper' rounds halves to
    even ("8.5" is 8), skips whatever is no letter or digit ("-3" is 3) and takes the first number of a range ("1-10
    scale: 9" is 1).
    """
    match = (_LEADING_NUMBER if parser == "strict" else _AUTHORS_NUMBER).match(text)
    if not match:
        return None
    number = float(match.group(1) + (match.group(2) or ""))
    if parser == "paper":
        score = round(number)
        return score if 1 <= score <= 10 else None
    # "0.8" is on a scale from 0 to 1, and "10.4" is out of range.
    return math.floor(number + 0.5) if 1 <= number <= 10 else None


def expected_score(result: ChoiceLogprobs) -> Score:
    """Returns the mean of the score under the model's distribution over 1..10, from the ten logprobs."""
    if result.error or not result.logprobs:
        return Score(None, text=result.error)
    top = max(result.logprobs)
    if not math.isfinite(top):
        return Score(None, text="the model gives no probability to any score")
    weights = [math.exp(x - top) for x in result.logprobs]
    distribution = [w / sum(weights) for w in weights]
    value = sum(n * p for n, p in enumerate(distribution, start=1))
    # Four digits are more than a score is precise to, and few enough to be equal on any number of devices.
    return Score(
        value=round(value, 4),
        argmax=distribution.index(max(distribution)) + 1,
        mass=round(math.exp(top) * sum(weights), 4),
        distribution=tuple(round(p, 4) for p in distribution),
    )


def sampled_score(results: Sequence[Completion], parser: str = "strict") -> Score:
    """Returns the mean of the numbers of sampled judgments, and the most frequent number (the lowest of several)."""
    numbers = Counter(n for r in results if (n := parse_score(r.text, parser)) is not None)
    text = "\n".join(r.error or r.text.strip() for r in results)
    if not numbers:
        return Score(None, text=text)
    mean = sum(n * count for n, count in numbers.items()) / numbers.total()
    return Score(round(mean, 4), argmax=min(numbers, key=lambda n: (-numbers[n], n)), text=text)


def probability_above(score: Score, threshold: float) -> float | None:
    """Returns P(score > threshold) under the model's distribution; None for a sampled or missing score."""
    if not score.distribution:
        return None
    return sum(p for n, p in enumerate(score.distribution, start=1) if n > threshold)


def median_mass(records: Sequence[Scores]) -> float | None:
    """Returns the median probability that the judge gave to the ten scores together; None if none is known."""
    scores = (score for record in records for score in (record.quality, record.following))
    masses = sorted(score.mass for score in scores if score is not None and score.mass is not None)
    return masses[len(masses) // 2] if masses else None
