"""Standard errors know which values belong together."""

import numpy as np
import pytest

from isheep_jax.evaluation.figures import figures_of, mean_figure


def test_one_value_each_gives_the_usual_standard_error():
    values = [0.0, 1.0, 1.0, 1.0, 0.5]
    figure = mean_figure([[v] for v in values])
    assert figure.value == pytest.approx(np.mean(values))
    assert figure.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
    assert figure.count == 5


def test_correlated_values_count_as_less():
    apart = mean_figure([[v] for v in [0, 0, 1, 1, 0, 0, 1, 1]])
    together = mean_figure([[0, 0], [1, 1], [0, 0], [1, 1]])
    assert apart.value == together.value == 0.5
    assert together.stderr > 1.4 * apart.stderr


def test_stderr_of_unequal_clusters_is_that_of_simulation():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        level = rng.normal(size=60)
        sizes = rng.integers(1, 5, size=60)
        figure = mean_figure([level[i] + rng.normal(size=n) for i, n in enumerate(sizes)])
        means.append(figure.value)
        errors.append(figure.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_one_cluster_has_no_error_and_no_value_is_refused():
    assert mean_figure([[1.0, 0.0]]).stderr == 0.0
    with pytest.raises(ValueError, match="at least one value"):
        mean_figure([[], []])


def test_missing_scores_do_not_count():
    figures = figures_of([("a", {"x": True, "y": [1, 0]}), ("b", {"y": []}), ("c", {"x": 0})])
    assert (figures["x"].value, figures["x"].count) == (0.5, 2)
    assert (figures["y"].value, figures["y"].count) == (0.5, 2)
