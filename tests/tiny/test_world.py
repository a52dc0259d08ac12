"""The world's checker is right about right and wrong responses, and its splits do not overlap."""

import json
import random

import pytest

from isheep_jax.evaluation import tiny
from isheep_jax.loop.prompting.templates import load
from isheep_jax.tiny import corpus, world
from isheep_jax.tiny.world import Item


def items(count: int, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)
    return [world.draw_item(rng) for _ in range(count)]


def test_right_response_passes_every_check():
    for item in items(2000):
        check = world.check(item, item.response)
        assert check.correct
        assert check.content
        assert all(check.constraints.values())


def test_wrong_answer_in_right_format_fails_on_content_alone():
    rng = random.Random(1)
    for item in items(2000, 1):
        check = world.check(item, world.apply_constraints(world.wrong_answer(item, rng), set(item.constraints)))
        assert not check.correct
        assert not check.content
        assert all(check.constraints.values())


@pytest.mark.parametrize("ignored", world.CONSTRAINTS)
def test_ignored_constraint_is_noticed_and_content_stays_right(ignored):
    # Words, not numbers: capital letters change nothing about a number.
    item = Item("copy", ("cat", "red"), (ignored, "done" if ignored != "done" else "sure"))
    check = world.check(item, world.apply_constraints(item.answer, set(item.constraints) - {ignored}))
    assert not check.correct
    assert check.content
    assert check.constraints == {c: c != ignored for c in item.constraints}


def test_right_responses_are_what_person_would_expect():
    assert Item("swap", ("red", "cat"), ("capitals", "done")).response == "CAT RED DONE"
    assert Item("count", ("red", "cat", "car"), ("stars", "thanks")).response == "* 3 * thanks"
    assert Item("kind", ("piano",), ("twice", "quotes", "label")).response == 'answer : " instrument ; instrument "'
    assert Item("before", ("17",), ("brackets", "sure")).response == "sure ( 16 )"
    assert Item("opposite", ("weak",), ()).response == "strong"


def test_parsing_instruction_gives_item_back():
    for item in items(2000, 2):
        assert world.parse_instruction(item.instruction) == item


@pytest.mark.parametrize(
    "text", ["", "Copy.", "Name the kind of hot.", "Add one to 31.", "Copy cat. Copy dog.", "Hello"]
)
def test_what_is_not_of_this_world_has_no_item(text):
    assert world.parse_instruction(text) is None


def test_splits_are_disjoint_by_meaning_and_stable():
    meanings = {
        split: {(i.task, i.arguments, frozenset(i.constraints)) for i in tiny.split_items(split)}
        for split in world.SPLITS
    }
    assert all(len(m) == tiny.PROMPTS for m in meanings.values())
    assert not meanings["development"] & meanings["selection"]
    assert not meanings["development"] & meanings["test"]
    assert not meanings["selection"] & meanings["test"]


def test_corpus_never_shows_held_out_instruction():
    held_out = tiny.TASK.held_out_texts()
    stream = corpus.documents(3)
    for _ in range(3000):
        for line in next(stream).splitlines():
            text = line.partition(": ")[2] or line.removeprefix("<|user|> ").partition("<|assistant|>")[0]
            assert text not in held_out
            item = world.parse_instruction(text)
            assert item is None or item.split == "train"


def test_writers_of_corpus_are_as_good_as_it_says():
    rng = random.Random(4)
    checks = [(i, world.check(i, corpus.web_response(i, rng))) for i in items(20_000, 4)]
    assert sum(c.content for _, c in checks) / len(checks) == pytest.approx(corpus.CONTENT_RIGHT, abs=0.03)
    for name, rate in world.OBEYED.items():
        obeyed = [c.constraints[name] for i, c in checks if name in c.constraints and i.task in ("copy", "swap")]
        assert sum(obeyed) / len(obeyed) == pytest.approx(rate, abs=0.06)


def test_grades_tell_good_from_bad_on_average():
    rng = random.Random(5)
    grades = {m: [corpus.grade(m, rng) for _ in range(2000)] for m in (2.5, 9.0)}
    assert all(1 <= g <= 10 for values in grades.values() for g in values)
    assert sum(grades[9.0]) / 2000 > sum(grades[2.5]) / 2000 + 4


def test_seed_tasks_are_right_and_not_held_out():
    lines = load("tiny").seeds_file("builtin").read_text().splitlines()
    for line in lines:
        seed = json.loads(line)
        item = world.parse_instruction(seed["instruction"])
        assert item is not None
        assert item.split == "train"
        assert seed["output"] == item.response
    found = [world.parse_instruction(json.loads(line)["instruction"]) for line in lines]
    assert {i.task for i in found} == set(world.TASKS)
    assert {c for i in found for c in i.constraints} == set(world.CONSTRAINTS)
