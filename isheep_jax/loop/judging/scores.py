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

from isheep_jax.chat_server import without_thought
from isheep_jax.config import AssessConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion
from isheep_jax.loop.records import Score, Scores

CRITERIA = ("quality", "following")
# What follows a prompt for a score.
NUMBERS = tuple(f" {n}" for n in range(1, 11))

# Characters of a judgment, after white space, among which its score stands.
_LOOKED_AT = 300
# Full-width letters, digits and signs, as they are written among Chinese and Japanese letters.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

# On one line: white space, and the marks that close bold text, quotes and brackets.
_CLOSED = r"(?:[^\S\n]|[*_`\"'”’»\])}])*"
_SCORE = re.compile(
    # White space, marks of bold text, opening quotes and brackets, a colon after the prompt.
    r"[\s*_`\"'“‘«(\[{:]*"
    # What it is, as chat models say it: "Rating:", "**Final score** (1-10):", "The score is".
    r"(?:(?:#+[^\S\n]*)?(?:(?:the|my|final|overall|total)\s+){0,2}"
    r"(?:rating|score|grade|mark|评分|得分|分数|スコア|점수|bewertung|puntuación|punteggio|оценка)\b"
    rf"{_CLOSED}(?:\((?:out\s+of\s+10|[01]\s*(?:-|–|to)\s*10)\){_CLOSED})?(?:[:=]|is\b)"
    r"[\s*_`\"'“‘«(\[{]*)?"
    r"(?P<number>\d{1,3}(?:\.\d{1,9})?)",
    re.IGNORECASE,
)
# What may follow a score. A number before any other word counts things: "3 errors".
_REASON = (
    r"(?:because|since|as|for|due|given|based|to|i|my|the|this|that|it|a|but|while|with)\b"
    r"|on\s+a\s+scale\s+(?:from|of)\s+[01]\s*(?:to|-|–)\s*10(?!\d)"
)
_UNIT = r"(?:(?:points?|marks?|pts)\b|[分点點점])"
_COUNTED = re.compile(rf"{_CLOSED}(?!{_REASON}|{_UNIT})[^\W\d_]", re.IGNORECASE)
# What follows a number that is no score.
_NO_SCORE = tuple(
    re.compile(rule, re.IGNORECASE)
    for rule in (
        # It is part of another number, a time, a date or a version.
        r"[\d.,:·٫_]*\d",
        # It is a percentage, an amount, a count of stars, or calculated with.
        r"\s*[%‰°€$£¥²³½¼¾×^+=★☆⭐]",
        # It is the first number of a range, a choice or a list.
        rf"{_CLOSED}(?:-|–|—|~|to\b|or\b|and\b|,|\*)\s*\d",
        r"[^\S\n]+\d",
        r"\s*\n\s*\d+[^\S\n]*(?:\n|\Z)",
        # It is part of a word, such as "8-bit".
        r"[-–][^\W\d_]",
        # They are points of something: "2 points deducted".
        rf"{_CLOSED}{_UNIT}{_CLOSED}(?!(?:because|since|as|due|given|based|i|the|this|it|out|of)\b)[^\W\d_]",
    )
)
# Out of what a score is, and the only answer to that: not "4 out of the 5", "8 points out of 100" or "10/10/2024".
_OUT_OF = re.compile(rf"{_CLOSED}{_UNIT}?\s*\(?\s*(?:/|out\s+of\b|of\b)", re.IGNORECASE)
_TEN = re.compile(r"\s*(?:(?:the|a|possible|total|maximum)\s+)*(?:10|ten)(?![\dA-Za-z/])(?!\.\d)", re.IGNORECASE)
# What follows the number of a list's item, and the number of a later one.
_ITEM = re.compile(r"\s*[.)]\s*[^\W\d_]")
_LATER_ITEM = re.compile(r"(?<![\d.,/])(\d{1,3})[.)]\s")
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
    """Returns the score that a judgment begins with, as a whole number; None unless it is from 1 to 10.

    parser: `assess.parser`. With both parsers "8||good" is 8 and "10/10" is 10, and "0" and "2024 is" give None.
    'strict' rounds halves up ("8.5" is 9), takes a label ("Rating: 8") and what follows a thought, and gives None where
    the number is none of a scale to ten: "-3", "1-10 scale: 9", "8 points out of 100", "3 errors", the 1 of a list.
    'paper' rounds halves to even ("8.5" is 8), skips whatever is no letter or digit ("-3" is 3) and takes the first
    number of a range ("1-10 scale: 9" is 1).
    """
    return _strict_score(text) if parser == "strict" else _papers_score(text)


def _strict_score(text: str) -> int | None:
    text = without_thought(text).lstrip()[:_LOOKED_AT].translate(_NARROW)
    match = _SCORE.match(text)
    if not match:
        return None
    number = float(match["number"])
    # "0.8" is on a scale from 0 to 1, and "10.4" is out of range.
    if not 1 <= number <= 10 or _is_no_score(number, text[match.end() :]):
        return None
    return math.floor(number + 0.5)


def _is_no_score(number: float, rest: str) -> bool:
    """Returns whether what follows a number shows that it is no score. A wrong score is worse than none: it is used."""
    if out_of := _OUT_OF.match(rest):
        ten = _TEN.match(rest, out_of.end())
        return not ten or bool(_COUNTED.match(rest, ten.end()))
    if _ITEM.match(rest):
        return number == 1 or any(int(later) == number + 1 for later in _LATER_ITEM.findall(rest))
    return bool(_COUNTED.match(rest)) or any(rule.match(rest) for rule in _NO_SCORE)


def _papers_score(text: str) -> int | None:
    match = _AUTHORS_NUMBER.match(text)
    number = float(match[1] + (match[2] or "")) if match else math.inf
    # Before it is rounded: a number of hundreds of digits is infinite.
    score = round(number) if number < 11 else 0
    return score if 1 <= score <= 10 else None


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
