"""The studies' rows change what they say, fit any config, and have the paper's numbers."""

import pytest

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.presets import apply_preset, replace_settings
from isheep_jax.studies.definitions import STUDIES, chosen_rows, named_study

PAPER = Config(evaluate=EvaluateConfig(tasks=("tiny",)))


def changed(study: str, row: str, config: Config | None = None) -> dict:
    """What a row changes, and to what."""
    (found,) = chosen_rows(STUDIES[study], [row])
    return found.changed(config or named_config("tiny"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_fits_the_tiny_config_and_the_papers(name):
    rows = STUDIES[name].rows
    assert len({row.name for row in rows}) == len({row.title for row in rows}) == len(rows)
    for config in (named_config("tiny"), PAPER):
        if STUDIES[name].needs:
            config = apply_preset("isara", config)
        STUDIES[name].check(config)
        settings = [str(row.settings(config)) for row in rows]
        assert len(set(settings)) == len(rows)


def test_each_control_changes_only_what_it_is_about():
    assert changed("loop", "loop") == {}
    assert changed("loop", "random") == {"select.rule": "random", "respond.samples": 1}
    assert changed("loop", "unfiltered") == {"select.rule": "none", "respond.samples": 1}
    assert changed("loop", "once_fraction") == {"iterations": 1, "synthesize.instructions": 3 * 512}
    assert changed("loop", "once_pairs") == {
        "iterations": 1,
        "synthesize.instructions": 3 * 512,
        "select.fraction": pytest.approx(0.1),
    }
    assert changed("iterative_settings", "total_last") == {"sft.data": "all", "sft.start": "previous"}
    assert changed("iterative_settings", "direct_2") == {"iterations": 1, "synthesize.instructions": 2 * 512}


def test_filters_keep_as_many_pairs_as_self_assessment():
    likelihood = {"select.rule": "perplexity", "assess.readings": ["likelihood"]}
    assert changed("filters", "perplexity") == {**likelihood, "select.max_pairs": 154}
    assert changed("filters", "density") == {"select.rule": "density", "select.clusters": 154}
    # The paper's rule keeps what passes, and its other filters have limits of their own.
    assert changed("filters", "random", PAPER) == {"select.rule": "random_threshold"}
    assert changed("filters", "perplexity", PAPER) == likelihood
    assert changed("filters", "density", PAPER) == {"select.rule": "density"}
    # A rule whose count follows from its settings gets a control of that count.
    density = replace_settings(PAPER, {"select.rule": "density", "select.clusters": 2500})
    random = {"select.rule": "random", "select.fraction": 0.25}
    assert changed("filters", "random", density) == random
    assert changed("filters", "perplexity", density) == {**likelihood, "select.max_pairs": 2500}


def test_scores_are_read_in_several_ways_at_equal_counts():
    assert changed("score_reading", "expected") == {}
    assert changed("score_reading", "sampled_4") == {"assess.read": "sampled", "assess.samples": 4}
    assert changed("score_reading", "expected", PAPER) == {"select.rule": "top_fraction"}


def test_the_threshold_is_that_of_the_papers_rule_wherever_it_is_studied():
    for row in ("above_8", "above_minus_1"):
        found = changed("threshold", row)
        assert (found["select.rule"], found["assess.read"], found["respond.samples"]) == ("threshold", "sampled", 1)
    assert changed("threshold", "above_8") | {"select.threshold": 8.0} == changed("loop", "reference") | {
        "select.threshold": 8.0
    }
    assert changed("threshold", "above_minus_1", PAPER)["select.threshold"] == -1


def test_rows_on_a_real_model_share_instructions_and_responses_unless_they_are_about_them():
    written = ("synthesize.", "respond.")
    for row in ("lift", "rubric", "random", "none"):
        assert not [name for name in changed("real_model", row, PAPER) if name.startswith(written)]
    assert {name for name in changed("real_model", "ssd", PAPER) if name.startswith(written)} == {
        "respond.temperature", "respond.top_p",
    }  # fmt: skip
    # As many pairs by chance as by a reading.
    fractions = {
        chosen_rows(STUDIES["real_model"], [row])[0].settings(PAPER).select.fraction for row in ("lift", "random")
    }
    assert len(fractions) == 1


def test_the_papers_headline_gain_is_that_of_its_numbers():
    # Section 4.4: +8.88 on IFEval's strict accuracy of prompts, from iteration 1 to iteration 5.
    one, *_ = chosen_rows(STUDIES["dromedary_vs_isheep"], ["one"])
    whole, *_ = chosen_rows(STUDIES["dromedary_vs_isheep"], ["all"])
    assert whole.paper[5] - one.paper[1] == pytest.approx(8.88)
    # All iterative settings share iteration 1 (Table 2).
    assert {row.paper[1] for row in STUDIES["iterative_settings"].rows if 1 in row.paper} == {one.paper[1]}


def test_a_misspelled_study_or_row_is_named_with_what_there_is():
    with pytest.raises(UserError, match=r"no study 'filter'; did you mean 'filters'\?"):
        named_study("filter")
    with pytest.raises(UserError, match="no row 'oracle' in this study; known: current, base, previous"):
        chosen_rows(STUDIES["judge"], ["oracle"])


def test_a_study_of_samples_is_refused_for_a_config_that_shows_none():
    with pytest.raises(UserError, match=r"need --synthesize.method=retrieved, as in --config=tiny_domain"):
        STUDIES["isara_domain"].check(named_config("tiny"))
    STUDIES["isara_domain"].check(named_config("tiny_domain"))
