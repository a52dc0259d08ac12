"""Means of scores with standard errors."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A mean over units of measurement.

    stderr: its standard error. count: number of units, such as prompts, or instructions in prompts.
    """

    value: float
    stderr: float
    count: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the figure as JSON values."""
        return asdict(self)


def mean_figure(clusters: Iterable[Sequence[float]]) -> Figure:
    """Returns the mean over all values, with a standard error that allows values of one cluster to be correlated.

    clusters: the values of each sample. With one value each it is the usual standard error of a mean (ddof 1), else
        that of a ratio estimator (Cochran, Sampling Techniques, 3rd edition, eq. 6.13).
    Raises ValueError without any value.
    """
    clusters = [list(map(float, values)) for values in clusters if len(values)]
    count = sum(map(len, clusters))
    if not count:
        raise ValueError("a mean needs at least one value")
    mean = sum(map(sum, clusters)) / count
    deviations = [sum(values) - mean * len(values) for values in clusters]
    n = len(clusters)
    variance = sum(d * d for d in deviations) / (n - 1) if n > 1 else 0.0
    return Figure(mean, math.sqrt(n * variance) / count, count)


def figures_of(scores: Iterable[tuple[str, Mapping[str, float | Sequence[float]]]]) -> dict[str, Figure]:
    """Returns the mean of each named score, clustered by sample.

    scores: id of the sample and its named values, of every response.
    """
    clusters: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample, values in scores:
        for name, value in values.items():
            clusters[name][sample] += [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)]
    return {name: mean_figure(by_sample.values()) for name, by_sample in clusters.items() if any(by_sample.values())}
