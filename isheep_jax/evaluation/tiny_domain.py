"""The task `tiny_domain`: held-out instructions of one domain of the tiny world, and the domain's samples.

The domain is operations on lists of words under one of six format constraints. `tiny/prompts/domain.jsonl` holds its
samples with correct responses, as a user would write them to adapt a model to the domain;
`python -m isheep_jax.evaluation.tiny_domain` prints them.
"""

import functools
import json
import random

from isheep_jax.evaluation.tiny import PROMPTS, task_of
from isheep_jax.tiny import world
from isheep_jax.tiny.world import Item

TASKS = ("copy", "first", "last", "swap")
CONSTRAINTS = ("twice", "quotes", "brackets", "stars", "label", "thanks")
SAMPLES = 12  # two of each constraint, three of each task


def draw_items(rng: random.Random, split: str, count: int) -> list[Item]:
    """Draws `count` items of the domain and the split, no two of the same meaning."""
    items: dict[tuple, Item] = {}
    while len(items) < count:
        item = _draw(rng, TASKS, rng.choice(CONSTRAINTS))
        if item.split == split:
            items.setdefault((item.task, item.arguments, item.constraints), item)
    return list(items.values())


def _draw(rng: random.Random, tasks: tuple[str, ...], constraint: str) -> Item:
    while True:
        item = world.draw_item(rng)
        if item.task in tasks:
            return Item(item.task, item.arguments, (constraint,), item.phrasing)


def samples() -> list[dict[str, str]]:
    """Returns question and answer of each sample."""
    rng, items = random.Random("tiny domain samples"), []
    while len(items) < SAMPLES:
        n = len(items)
        item = _draw(rng, (TASKS[n % len(TASKS)],), CONSTRAINTS[(n + n // len(CONSTRAINTS)) % len(CONSTRAINTS)])
        if item.split == "train":
            items.append(item)
    return [{"question": item.instruction, "answer": item.response} for item in items]


@functools.cache
def split_items(split: str) -> tuple[Item, ...]:
    """Returns the split's fixed items, in a random order."""
    return tuple(draw_items(random.Random(f"tiny domain {split}"), split, PROMPTS))


TASK = task_of("a domain of the tiny world", "tiny_domain", split_items)


if __name__ == "__main__":
    for sample in samples():
        print(json.dumps(sample))
