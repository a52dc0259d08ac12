"""The length-controlled win rate of AlpacaEval 2 (Dubois et al., 2024, arXiv 2404.04475), from preferences and lengths.

The paper fits P(preferred) = sigmoid(a + b tanh(d / std(d)) + c g), where d is the difference of the two lengths and g
the difficulty of the instruction, and reports the mean of the prediction with b = 0. The difficulties come from a fit
to the whole leaderboard, which is not published with the outputs; here c = 0, so that the result is sigmoid(a).

Short responses are mostly those of weak models, so that a free b takes what is due to a. The paper holds it with
verdicts on a terse and a verbose GPT-4, which are not published with the outputs either; here a prior does. From the
published verdicts on 56 models, this figure is 1.3 percentage points off the leaderboard's on average, and 4.8 at
most; without the prior it would be 6.6 and 27 (measured).
"""

from collections.abc import Sequence

import numpy as np

from isheep_jax.evaluation.figures import Figure

# Preferences are kept so far from 0 and 1 that the fit is finite when one side always wins.
_MARGIN = 1e-4
# Variance of the normal prior of b, with mean 0: small enough to hold it, and the same for every judge.
_PRIOR_VARIANCE = 0.1
_PRECISION = np.array([0.0, 1 / _PRIOR_VARIANCE])
_MOST_STEPS = 100


def length_controlled_win_rate(
    preferences: Sequence[float], lengths: Sequence[float], reference_lengths: Sequence[float]
) -> Figure:
    """Returns the win rate that is expected of responses as long as the reference's, with its standard error.

    The standard error is that of a with the covariance of misspecified models (White, 1982), times the slope of the
    sigmoid.

    preferences: how far each response is preferred to the reference's (0 to 1).
    lengths, reference_lengths: of both, in characters.
    """
    y = np.clip(np.asarray(preferences, float), _MARGIN, 1 - _MARGIN)  # [N]
    difference = np.asarray(lengths, float) - np.asarray(reference_lengths, float)
    spread = difference.std()
    feature = np.tanh(difference / spread) if spread else np.zeros_like(difference)
    x = np.stack([np.ones_like(feature), feature], axis=1)  # [N, 2]
    weights = _fit(x, y)
    residual = (y - _sigmoid(x @ weights))[:, None] * x
    bread = np.linalg.inv(_hessian(x, weights))
    covariance = bread @ (residual.T @ residual) @ bread
    value = float(_sigmoid(weights[0]))
    return Figure(value, float(value * (1 - value) * np.sqrt(covariance[0, 0])), len(y))


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the weights [2] of the logistic regression, by Newton's method with halved steps."""
    weights = np.zeros(2)
    for _ in range(_MOST_STEPS):
        gradient = x.T @ (_sigmoid(x @ weights) - y) + _PRECISION * weights
        step = np.linalg.solve(_hessian(x, weights), gradient)
        while _loss(x, y, weights - step) > _loss(x, y, weights) and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def _loss(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    z = x @ weights
    return float((np.logaddexp(0, z) - y * z).sum() + (_PRECISION * weights**2).sum() / 2)


def _hessian(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    p = _sigmoid(x @ weights)
    return (x * (p * (1 - p))[:, None]).T @ x + np.diag(_PRECISION)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))
