"""What the rules against blind spots see, and what they leave alone."""

import gzip
import json

import pytest
from published import published

from isheep_jax.loop.filters.blind_spots import (
    BREAKS_OFF,
    ECHO,
    HALF_ECHO,
    LOOP,
    NO_PUNCTUATION,
    POLITE,
    RULES,
    blind_spot,
)

ALL = frozenset(RULES)
TASK = "Explain why the sea is salty."
ANSWER = "Rain washes salt out of rocks, and rivers carry it to the sea. The sun lifts only the water again."
SPANISH = "el mar es salado porque los ríos llevan la sal de las rocas al mar y el sol levanta solo el agua otra vez"
WORD_LIST = (
    "fig pear plum apple grape cherry melon peach lemon lime kiwi mango date quince berry nut olive bean pea corn"
)
ROUND = "Rivers carry salt to the sea. "

CASES = {
    "the instruction": (TASK, "", TASK, ECHO),
    "the instruction in other case": (TASK, "", "explain why the SEA is salty", ECHO),
    "the instruction under a label": (TASK, "", f"Instruction: {TASK}", ECHO),
    "instruction and input": ("Sort these words.", "pear fig", "Sort these words.\npear fig", ECHO),
    "the instruction, then an answer": (TASK, "", f"{TASK} {ANSWER}", HALF_ECHO),
    "rounds from the beginning": (TASK, "", ROUND * 3, LOOP),
    "rounds at the end": (TASK, "", ANSWER + " " + ROUND * 5, LOOP),
    "a numbered list of the same": (TASK, "", "".join(f"{n}. Salt is in rocks.\n" for n in range(1, 6)), LOOP),
    "the same with changes": (
        TASK,
        "",
        " ".join(
            f"The sea is salty because the rivers carry {x}." for x in ["salt", "rock", "sand", "mud", "clay", "lime"]
        ),
        LOOP,
    ),
    "an offer of help": (TASK, "", "Thank you for your question! I would be happy to help you with that.", POLITE),
    "an open sentence": (TASK, "", ANSWER + " As the water rises into", BREAKS_OFF),
    "an open word": (TASK, "", "It is because the rivers carry salt from the", BREAKS_OFF),
    "words without marks": (
        TASK,
        "",
        "the rain washes salt out of the rocks and the rivers carry it to the sea where it stays for good",
        NO_PUNCTUATION,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_response_in_a_blind_spot_is_found_for_its_reason(name):
    instruction, input, response, reason = CASES[name]
    assert blind_spot(frozenset({reason}), instruction, input, response) == reason
    assert blind_spot(ALL - {reason}, instruction, input, response) != reason


RIGHT = {
    "an answer": (TASK, "", ANSWER),
    "a short answer": ("What is the capital of France?", "", "Paris"),
    "a sentence without a full stop": ("What is the capital of France?", "", "The capital of France is Paris"),
    "a text under its title": ("Benefits of regular exercise", "", "Benefits of Regular Exercise\nIt keeps you well."),
    "a sum that is written out": ("12 * 4 + 2", "", "12 * 4 + 2 = 50"),
    "words of the instruction": ("Copy red car bus.", "", "red car bus"),
    "a copied input": ("Correct the sentence if needed.", "She goes home.", "She goes home."),
    "code that goes on with code": ("def add(a, b):", "", "def add(a, b):\n    return a + b"),
    "twice, as asked": ("Name the fruit. Say it twice.", "", "LEMON ; LEMON"),
    "a line written again and again": ("Write the line 'I am on time' ten times.", "", "I am on time.\n" * 10),
    "a list with one opening": ("Write five wishes.", "", "I wish to sing.\nI wish to paint.\nI wish to sleep."),
    "politeness that was asked for": ("Write a reply.", "", "Thank you for your message! We are happy to help."),
    "a list": ("Name three rivers.", "", "1. The Elbe\n2. The Rhine\n3. The Main"),
    "a text that ends with hashtags": ("Write a tweet.", "", "Salt is in the sea. Rivers carry it! #sea #salt"),
    "words of another language": (TASK, "", SPANISH),
    "a list of words": ("List words.", "", WORD_LIST),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_response_has_no_blind_spot(name):
    assert blind_spot(ALL, *RIGHT[name]) is None


def test_only_rules_that_are_named_are_looked_at():
    assert blind_spot(frozenset(), TASK, "", TASK) is None
    assert blind_spot(frozenset({LOOP}), TASK, "", TASK) is None


def test_every_loop_of_three_rounds_is_found_whatever_its_length():
    words = [f"w{n}" for n in range(60)]
    for size in range(3, 61):
        assert blind_spot(frozenset({LOOP}), TASK, "", " ".join(words[:size] * 3)) == LOOP
        assert blind_spot(frozenset({LOOP}), TASK, "", " ".join(words[:size] * 2)) is None


def _outputs(path):
    return [(row["instruction"], "", row["output"]) for row in json.loads(path.read_text())]


def _self_instruct(path):
    tasks = map(json.loads, path.read_text().splitlines())
    return [(t["instruction"], i["input"], i["output"]) for t in tasks for i in t["instances"]]


def _mbpp(path):
    return [(row["text"], "", row["code"]) for row in map(json.loads, path.read_text().splitlines())]


def _humaneval(path):
    with gzip.open(path, "rt") as file:
        return [(r["prompt"], "", r["prompt"] + r["canonical_solution"]) for r in map(json.loads, file)]


@pytest.mark.parametrize(
    ("task", "file", "read"),
    [
        ("alpaca_eval", "gpt4_1106_preview_outputs.json", _outputs),
        ("alpaca_eval", "Qwen1.5-7B-Chat_outputs.json", _outputs),
        ("self_instruct", "seed_tasks.jsonl", _self_instruct),
        ("mbpp", "mbpp.jsonl", _mbpp),
        ("humaneval", "HumanEval.jsonl.gz", _humaneval),
    ],
)
def test_less_than_one_in_a_hundred_published_answers_has_a_blind_spot(task, file, read):
    rows = read(published(f"{task}/{file}"))
    found = [row for row in rows if blind_spot(ALL, *row)]
    assert len(found) <= 0.01 * len(rows)
