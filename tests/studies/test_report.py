"""The tables and the picture hold what was measured, with the right intervals."""

import dataclasses
import json

import pytest

from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.presets import replace_settings
from isheep_jax.studies import figure, report
from isheep_jax.studies.definitions import Row, Study
from isheep_jax.studies.report import Estimate
from isheep_jax.studies.runs import Result

LOOP = Row("loop", "the loop", paper={1: 35.67, 2: 37.34})
RANDOM = Row("random", "random pairs")
ONCE = Row("once", "one round", column=2)
STUDY = Study("A study", (LOOP, RANDOM, ONCE), "Table 9.")


def result(*accuracies: float, stopped: str = "") -> Result:
    evaluations = [{"tiny": {"accuracy": a, "count": 512, "content": 1 - a / 10}} for a in accuracies]
    return Result(evaluations, [{"kept": 10 * n} for n in range(len(accuracies))], stopped)


RESULTS = {
    "base_x": {
        "loop": {1: result(0.1, 0.5, 0.7), 2: result(0.1, 0.7, 0.9)},
        "random": {1: result(0.1, 0.4, 0.59), 2: result(0.1, 0.5, 0.81)},
        "once": {1: result(0.1, 0.6)},
    }
}


def test_intervals_are_students():
    # Three values 1, 2, 6 have mean 3, standard deviation sqrt(7), t 4.303 of two degrees of freedom.
    found = Estimate.of([1.0, 2.0, 6.0])
    assert found.mean == 3
    assert found.half == pytest.approx(4.30265 * (7 / 3) ** 0.5, rel=1e-5)
    assert Estimate.of([0.25]) == Estimate(0.25, None, 1)


def test_the_table_gives_mean_interval_counts_and_the_papers_numbers():
    config = replace_settings(named_config("tiny"), {"evaluate.limit": 1000})
    text = report.markdown(STUDY, STUDY.rows, RESULTS, config)
    assert "Base `base_x`: tiny accuracy on 512 held-out prompts (development); mean ± half the 95 %" in text
    assert "over seeds 1, 2 (Student's t)." in text
    # t is 12.706 for two values, and the standard error of 0.5 and 0.7 is 0.1.
    row = "| the loop | 2 | 0.100 | 0.600 ± 1.271 | 0.800 ± 1.271 | 10 / 20 | 0.990 → 0.920 ± 0.127 | 35.67 → 37.34 |"
    assert row in text
    # One round of two rounds' instructions stands beside the second.
    assert "| one round | 1 | 0.100 |  | 0.600 | 10 | 0.990 → 0.940 |  |" in text
    assert "- the loop: 1: 0.500 0.700 | 2: 0.700 0.900" in text
    assert "Table 9." in text


def test_differences_are_paired_by_seed_and_bold_beyond_their_interval():
    text = report.markdown(STUDY, STUDY.rows, RESULTS, named_config("tiny"))
    # Iteration 1: -0.1 and -0.2; iteration 2: -0.11 and -0.09, of values whose own intervals are ten times as wide.
    assert "| random pairs | -0.150 ± 0.635 | -0.100 ± 0.127 | -0.100 ± 0.127 |" in text
    closer = {"b": {"loop": RESULTS["base_x"]["loop"], "random": {1: result(0.1, 0.5, 0.6), 2: result(0.1, 0.7, 0.8)}}}
    text = report.markdown(STUDY, STUDY.rows, closer, named_config("tiny"))
    assert "| random pairs | +0.000 ± 0.000 | **-0.100 ± 0.000** | **-0.100 ± 0.000** |" in text


def test_a_seed_that_one_row_lacks_is_left_out_of_its_difference():
    found = report.differences(ONCE, RESULTS["base_x"]["once"], LOOP, RESULTS["base_x"]["loop"], "")
    assert found.keys() == {2, "last"}
    assert found[2].mean == pytest.approx(-0.1)
    assert found[2].count == 1


def test_a_run_that_ended_early_is_counted_where_it_was_and_explained():
    results = {"b": {"loop": {1: result(0.1, 0.5, 0.7), 2: result(0.1, 0.6, stopped="select: 0 pairs are kept")}}}
    text = report.markdown(STUDY, STUDY.rows, results, named_config("tiny"))
    assert "| the loop | 2 | 0.100 | 0.550 ± 0.635 | 0.700 (1 of 2) |" in text
    assert "seed 2 ended early: select: 0 pairs are kept" in text


def test_another_measure_is_read_by_its_path():
    study = Study("Content", STUDY.rows, measure="tiny.content")
    text = report.markdown(study, [LOOP], RESULTS, named_config("tiny"))
    assert "| the loop | 2 | 0.990 | 0.940 ± 0.127 |" in text


def test_a_loss_is_shown_beside_the_accuracy_which_is_compared():
    config = replace_settings(named_config("tiny"), {"evaluate.tasks": ("tiny", "self_instruct")})
    losses = [{"self_instruct": {"loss": 2.5 - n / 10, "count": 175}} for n in range(3)]
    run = result(0.1, 0.5, 0.6)
    run = dataclasses.replace(run, evaluations=[{**e, **loss} for e, loss in zip(run.evaluations, losses, strict=True)])
    text = report.markdown(STUDY, [LOOP], {"b": {"loop": {1: run}}}, config)
    assert "tiny accuracy and self_instruct loss on 512 and 175 held-out prompts" in text
    assert "self_instruct.loss, base to last" in text
    assert "2.500 → 2.300" in text
    assert "| the loop | 1 | 0.100 | 0.500 | 0.600 |" in text


def test_the_json_has_every_figure():
    found = json.loads(json.dumps(report.values(STUDY, STUDY.rows, RESULTS, named_config("tiny"))))
    row = found["bases"]["base_x"]["loop"]
    assert row["mean"]["2"] == {
        "mean": pytest.approx(0.8),
        "half_interval": pytest.approx(1.2706, rel=1e-3),
        "seeds": 2,
    }
    assert row["paper"] == {"1": 35.67, "2": 37.34}
    assert row["runs"]["2"]["evaluations"][2]["tiny"]["accuracy"] == 0.9
    assert found["bases"]["base_x"]["random"]["minus_first_row"]["last"]["mean"] == pytest.approx(-0.1)


def test_the_picture_is_a_png_that_follows_the_figures(tmp_path):
    pytest.importorskip("matplotlib")
    figure.draw(tmp_path / "a.png", STUDY, STUDY.rows, RESULTS)
    figure.draw(tmp_path / "again.png", STUDY, STUDY.rows, RESULTS)
    other = {"base_x": {**RESULTS["base_x"], "loop": {1: result(0.1, 0.2, 0.3)}}}
    figure.draw(tmp_path / "b.png", STUDY, STUDY.rows, other)
    first, again, second = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "again", "b"))
    assert first.startswith(b"\x89PNG\r\n")
    assert first == again != second


def test_the_picture_names_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    figure.draw(tmp_path / "a.svg", STUDY, STUDY.rows, RESULTS)
    text = (tmp_path / "a.svg").read_text()
    for row in STUDY.rows:
        assert f"<!-- {row.title} -->" in text


def test_a_picture_that_cannot_be_drawn_is_refused_before_any_run(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--figure: .*a.pdf should end with .png or .svg"):
        figure.check(tmp_path / "a.pdf")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"--figure: pictures need matplotlib: pip install"):
        figure.check(tmp_path / "a.png")
