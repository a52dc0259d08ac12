"""The best iteration and the end of a run, on summaries written by hand."""

import pytest

from isheep_jax.config import StopConfig
from isheep_jax.loop.summary import IterationSummary, best_iteration, has_stopped_improving


def rows(*accuracies, losses=None):
    losses = losses or [None] * len(accuracies)
    return [
        IterationSummary(
            n,
            validation_loss=loss,
            evaluation={} if a is None else {"x": {"accuracy": a - 0.1}, "y": {"accuracy": a + 0.1}},
        )
        for n, (a, loss) in enumerate(zip(accuracies, losses, strict=True))
    ]


def test_the_best_has_the_highest_mean_accuracy_and_is_the_earliest_of_equals():
    assert best_iteration(rows(0.1, 0.5, 0.4), StopConfig()) == {"iteration": 1, "measure": "accuracy", "value": 0.5}
    assert best_iteration(rows(0.1, 0.5, 0.5), StopConfig())["iteration"] == 1
    assert best_iteration(rows(0.6, 0.5), StopConfig())["iteration"] == 0


def test_without_a_task_the_validation_loss_decides_and_without_both_nothing():
    found = best_iteration(rows(None, None, None, losses=[None, 2.0, 1.5]), StopConfig())
    assert found == {"iteration": 2, "measure": "validation_loss", "value": 1.5}
    assert best_iteration(rows(None, None), StopConfig()) is None
    both = rows(0.1, 0.5, 0.4, losses=[None, 2.0, 1.5])
    assert best_iteration(both, StopConfig(measure="validation_loss"))["iteration"] == 2
    assert best_iteration(both, StopConfig(measure="accuracy"))["iteration"] == 1


@pytest.mark.parametrize(
    ("accuracies", "patience", "ends"),
    [
        ((0.1, 0.5), 1, False),
        ((0.1, 0.5, 0.5), 1, True),
        ((0.1, 0.5, 0.51), 1, False),
        ((0.1, 0.5, 0.4), 2, False),
        ((0.1, 0.5, 0.4, 0.49), 2, True),
        ((0.1, 0.5, 0.4, 0.51), 2, False),
        ((0.6, 0.5), 1, True),
    ],
)
def test_the_run_ends_after_as_many_iterations_without_a_better_value(accuracies, patience, ends):
    assert has_stopped_improving(rows(*accuracies), StopConfig(measure="accuracy", patience=patience)) is ends
    assert not has_stopped_improving(rows(*accuracies), StopConfig(patience=patience))
    losses = [None, *(1 - a for a in accuracies[1:])]
    by_loss = StopConfig(measure="validation_loss", patience=patience)
    expected = has_stopped_improving(rows(*[None] * len(losses), losses=losses), by_loss)
    # The base model has no loss: it can only be the best by accuracy.
    assert expected is (ends and accuracies[0] < max(accuracies))
