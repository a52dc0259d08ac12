"""The card inside an iteration's model/."""

import dataclasses
import re

import pytest
import yaml

from isheep_jax.config import AssessConfig, Config, SFTConfig
from isheep_jax.loop.card import model_card


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
