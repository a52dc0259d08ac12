"""Assumed lengths of texts in tokens, and numbers of texts drawn with them."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """Assumed lengths of texts in tokens, for general instruction data; only a run can tell the real ones."""

    shot: int = 130
    """A seed task in a prompt: instruction, input and output."""
    per_instruction: int = 250
    """New tokens for each instruction that passes the rules and the novelty filter."""
    instruction: int = 30
    """An instruction with its input."""
    response: int = 250
    """A response."""
    judgment_prefix: int = 160
    """The judge's prompt before the pair, which all prompts share."""
    judgment_prompt: int = 30
    """The judge's prompt after the pair."""
    backward_prompt: int = 50
    """The prompt for an instruction by its response, without the pair."""
    follow_up_prompt: int = 80
    """The prompt for a second turn without the pair."""
    thoughts: int = 50
    """Thoughts that precede a response by principles."""
    thorough_prompt: int = 90
    """The request for a thorough answer."""
    thorough: int = 400
    """A thorough answer."""
    template: int = 20
    """Tokens that the chat template adds to a pair."""
    choice: int = 2
    """Tokens of a score that is a choice, such as " 7||", after the first one."""
    spread: float = 0.9
    """Standard deviation of the logarithm of a text's length: responses have 90 at the tenth, 530 at the ninetieth."""
    shot_spread: float = 0.5
    """The same of seed tasks."""
    endless: float = 0.8
    """Share of a base model's completions of a list that go on to synthesize.max_tokens; others end anywhere before."""
    seed: int = 0
    """Seeds the order of the lengths."""


def draw(
    mean: float,
    count: int,
    lengths: Lengths,
    *,
    most: float = math.inf,
    spread: float | None = None,
    purpose: int = 0,
) -> np.ndarray:
    """Returns lengths [count] in whole tokens, lognormal up to a limit that longer ones are cut to.

    They are the quantiles of the distribution, so that their mean is as given for any seed; only their order is drawn.

    Args:
        mean: of the lengths, cut.
        count: how many.
        lengths: gives the spread and the seed.
        most: the limit; a mean above it is the limit.
        spread: of the logarithm; None: that of `lengths`.
        purpose: tells the orders of several draws apart.
    """
    if mean >= most:
        return np.full(count, int(most))
    normal, spread = NormalDist(), lengths.spread if spread is None else spread
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    low, high = 0.0, max(mean, 1.0) * math.exp(spread**2) + (most if math.isfinite(most) else mean)
    for _ in range(50):
        median = (low + high) / 2
        drawn = np.minimum(median * np.exp(spread * quantiles), most)
        low, high = (median, high) if drawn.mean() < mean else (low, median)
    order = np.random.default_rng((lengths.seed, purpose)).permutation(count)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)[order]


def draw_endless(most: int, count: int, lengths: Lengths, *, purpose: int = 0) -> np.ndarray:
    """Returns lengths [count] of completions of a list, most of which go on until they are cut.

    Args:
        most: tokens at which they are cut.
        count: how many.
        lengths: gives the share that is cut, and the seed.
        purpose: tells the orders of several draws apart.
    """
    ended = round((1 - lengths.endless) * count)
    drawn = np.full(count, most, np.int64)
    drawn[:ended] = np.maximum(1, most * (np.arange(ended) + 0.5) / max(ended, 1))
    return drawn[np.random.default_rng((lengths.seed, purpose)).permutation(count)]


def mean_endless(most: int, lengths: Lengths) -> float:
    """Returns the mean of `draw_endless`."""
    return most * (lengths.endless + (1 - lengths.endless) / 2)
