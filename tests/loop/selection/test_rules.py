import pytest

from isheep_jax.config import AssessConfig, Config, SelectConfig, SynthesizeConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.selection.rules import RULES, check_readings, effective_rule, needs_clusters
from isheep_jax.loop.selection.select import describe

SERVER = AssessConfig(judge="https://x/v1", judge_model="m", read="sampled")


@pytest.mark.parametrize("name", RULES)
def test_entries_are_consistent(name):
    rule = RULES[name]
    assert (rule.representative == "best") == (rule.order is not None)
    assert rule.order is not None or not rule.tops_up
    assert rule.as_many_as in ("", *RULES)
    assert rule.share is None or 0 < rule.share(Config()) <= 1
    assert "select." in rule.hint(SelectConfig()) or name == "none"


def test_descriptions_differ_and_name_the_scores_that_are_asked_for():
    configs = [Config(select=SelectConfig(rule=name)) for name in RULES]
    assert len({describe(config) for config in configs}) == len(RULES)
    assert describe(Config()) == "those with both scores above 8"
    assert describe(Config(assess=AssessConfig(level="quality"))) == "those with the score above 8"
    assert describe(Config(assess=AssessConfig(prompt="joint"))) == "those with the score above 8"


@pytest.mark.parametrize("name", RULES)
def test_without_scores_only_rules_that_need_none_are_in_force(name):
    config = Config(select=SelectConfig(rule=name), assess=AssessConfig(readings=()))
    by_scores = name in ("threshold", "top_fraction", "random_threshold")
    assert effective_rule(config) == ("none" if by_scores else name)
    assert effective_rule(Config(select=SelectConfig(rule=name))) == name


@pytest.mark.parametrize("name", RULES)
def test_a_server_as_judge_excludes_what_needs_its_weights(name):
    config = Config(select=SelectConfig(rule=name), assess=SERVER)
    assert needs_clusters(config) == (name in ("density", "density_perplexity"))
    message = {
        "perplexity": "--select.rule: perplexity needs likelihood in --assess.readings",
        "density": "--select.rule: density needs the judge's weights",
        "density_perplexity": "--select.rule: density_perplexity needs likelihood in --assess.readings",
    }.get(name)
    if message:
        with pytest.raises(UserError, match=message):
            check_readings(config)
    else:
        check_readings(config)


def test_shares_of_the_density_rules_follow_the_clusters():
    settings = {"select": SelectConfig(clusters=160), "synthesize": SynthesizeConfig(instructions=1600)}
    assert RULES["density"].share(Config(**settings)) == 0.1
    assert RULES["density_perplexity"].share(Config(**settings)) == 0.1
