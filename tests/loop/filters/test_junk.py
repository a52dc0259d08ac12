import json

import pytest
from published import published

from isheep_jax.loop.filters.junk import junk_reason
from isheep_jax.loop.filters.text_rules import instruction_reason
from isheep_jax.loop.prompting.templates import load


@pytest.mark.parametrize(
    ("instruction", "input", "reason"),
    [
        ("Sing that you are a a a sheep in the field.", "", None),  # single letters may be names in a program
        ("Sing of the sheep sheep sheep in the field.", "", "loops"),
        ("I am a sheep. I am a sheep. I am a sheep.", "", "loops"),
        ("Sum up the note.", "1. I am not sure. 2. I am not sure. 3. I am not sure.", "loops"),
        ("Add these up.", "10 10 10", None),
        ("Write a letter to [your landlord] about the heating.", "", "has a placeholder"),
        ("Translate the word.", "<word>", "has a placeholder"),
        ("Translate the word.", "...", "has a placeholder"),
        ("Find the largest of these.", "{10, 22, 5}", None),
        ("Write a poem about the river, the hill and", "", "cut off"),
        ("Write a poem about the river,", "", "cut off"),
        ("Name what these have in common:", "", "cut off"),
        ("Name what these have in common:", "plum, pear, fig", None),
        ("What is a pear made of", "", None),
        ("What is this, and what is that?", "", "names no content"),
        ("What is this, and what is that?", "a pear and a plum", None),
        ("Rewrite the following sentence politely.", "", "lacks its input"),
        ("Rewrite the following sentence politely.", "Go away.", None),
        ("Rewrite the following sentence politely: go away.", "", None),
        ('Rewrite this sentence politely, "go away".', "", None),
        ("The most beautiful tree is not the highest. It is old.", "", "asks for nothing"),
        ("The pears are ripe. Suggest a dish for tonight.", "", None),
        ("I would like a dish with ripe pears for tonight.", "", None),
        ("The pears are ripe. What now?", "", None),
        ("Choose the largest island on earth.", "The largest island on earth.", "input repeats the instruction"),
        ("Choose the largest island in the world.", "Crete, Malta, Java", None),
        ("Invent a new race for our village fair.", "200000000002", "bare numbers as input"),
        ("Sort the numbers from small to large.", "12, 5, 9.5", None),
        ("Which island is the largest? Answer: Greenland", "", "has its answer"),
        ("Which island is the largest?", "The answer is Greenland.", "has its answer"),
        ("Which answer is polite, and why?", "yes or no", None),
        ("1. What is a pear?\n2. What is a plum?", "", "several tasks"),
        ("What is a pear? Where does it grow?", "", None),
    ],
)  # fmt: skip
def test_each_kind_of_junk_has_its_reason(instruction, input, reason):
    assert junk_reason(instruction, input) == reason


def dropped_share(tasks):
    """Share of the tasks that the paper's rules keep and those for junk drop."""
    usable = [task for task in tasks if not instruction_reason("paper", *task)]
    return sum(junk_reason(*task) is not None for task in usable) / len(usable)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_seed_of_the_standard_prompts_is_junk():
    seeds = [s for s in lines(load("standard").seeds_file("builtin")) if s["language"] == "en"]
    assert dropped_share([(s["instruction"], s["instances"][0]["input"]) for s in seeds]) == 0


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (
            "self_instruct/seed_tasks.jsonl",
            lambda path: [(s["instruction"], s["instances"][0]["input"]) for s in lines(path)],
        ),
        (
            "alpaca_eval/gpt4_1106_preview_outputs.json",
            lambda path: [(x["instruction"], "") for x in json.loads(path.read_text())],
        ),
        ("ifeval/input_data.jsonl", lambda path: [(x["prompt"], "") for x in lines(path)]),
    ],
)
def test_at_most_two_percent_of_published_instructions_are_junk(name, read):
    assert dropped_share(read(published(name))) <= 0.02
