"""The card inside an iteration's model/."""

import dataclasses
import re

import pytest
import yaml

from isheep_jax.config import AssessConfig, Config, SelectConfig, SFTConfig
from isheep_jax.loop.card import Step, lineage_card, model_card


def test_two_runs_of_one_config_have_the_same_card_wherever_and_whenever_they_ran():
    cards = {model_card(dataclasses.replace(Config(), workdir=place), 2, 100, 30) for place in ("/a", "/b/c")}
    assert len(cards) == 1
    (card,) = cards
    assert not re.search(r"\b20\d\d\b|\d\d:\d\d|second|/a", card)


def test_it_begins_with_front_matter_that_is_yaml():
    _, matter, text = model_card(Config(), 1, 100, 30).split("---\n", 2)
    assert yaml.safe_load(matter) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert text.startswith("\n# custom, iteration 1\n")


@pytest.mark.parametrize(
    ("iteration", "start", "judge", "words"),
    [
        (1, "previous", "current", ["written by the base model", "from the base model", "10, by the base model"]),
        (2, "previous", "current", ["by the model of iteration 1", "from the model of iteration 1"]),
        (2, "base", "base", ["by the model of iteration 1", "from the base model", "10, by the base model"]),
    ],
)
def test_it_names_who_wrote_who_judged_and_where_training_began(iteration, start, judge, words):
    config = Config(sft=SFTConfig(start=start), assess=AssessConfig(judge=judge))
    card = model_card(config, iteration, 100, 30)
    for word in words:
        assert word in card
    assert "| instructions | 100," in card
    assert "| kept | 30 pairs" in card


@pytest.mark.parametrize(
    ("assess", "scores"),
    [
        (
            AssessConfig(judge="previous"),
            "quality and following the instruction, 1 to 10, by the model of iteration 1 (e",
        ),
        (AssessConfig(level="quality", read="sampled"), "quality, 1 to 10, by the model of iteration 2 (sampled)"),
        (AssessConfig(prompt="joint", judge="base"), "one for all, 1 to 10, by the base model (expected)"),
        (AssessConfig(judge="org/big"), "following the instruction, 1 to 10, by org/big"),
        (AssessConfig(judge="https://x/v1", judge_model="big"), "following the instruction, 1 to 10, by big"),
        (AssessConfig(readings=()), "none |"),
    ],
)
def test_it_says_what_was_scored_and_by_whom(assess, scores):
    card = model_card(Config(assess=assess), 3, 100, 30)
    assert f"| scores | {scores}" in card or scores in card.partition("| scores | ")[2].splitlines()[0]


def test_only_a_judge_from_elsewhere_takes_back_that_the_scores_are_the_models_own():
    for judge, own in (("previous", True), ("base", True), ("org/big", False), ("https://x/v1", False)):
        config = Config(assess=AssessConfig(judge=judge, judge_model="big"))
        settings = dataclasses.asdict(config)
        for card in (model_card(config, 1, 1, 1), lineage_card(settings, "", {}, [Step(0), Step(1)], False)):
            text = " ".join(card.split())
            assert ("no other model wrote or judged" in text) is own
            assert ("scores of another model" in text) is not own


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (SelectConfig(), "30 pairs of all iterations so far: those with both scores above 8"),
        (SelectConfig(rule="perplexity"), "perplexity of at most 50"),
        (SelectConfig(rule="top_fraction", ranking="probability"), "by the probability of both scores above 8"),
    ],
)
def test_it_says_what_was_kept_and_of_what(select, words):
    card = model_card(Config(select=select, sft=SFTConfig(data="all")), 2, 100, 30)
    assert words in card
