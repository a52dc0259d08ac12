"""One domain of the tiny world: operations on lists of words under one of six format constraints.

`domain.jsonl` beside the prompts holds its samples, with the right responses: what a person would write down to adapt a
model to the domain. `python -m isheep_jax.evaluation.tiny_domain` prints them. Measured are held-out instructions of
the domain.
"""

import functools
import json
import random
from collections.abc import Callable

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.tiny import PROMPTS, evaluator_of
from isheep_jax.tiny import world
from isheep_jax.tiny.world import Item

TASKS = ("copy", "first", "last", "swap")
CONSTRAINTS = ("twice", "quotes", "brackets", "stars", "label", "thanks")
SAMPLES = 12  # two of each constraint, three of each task


def draw_items(rng: random.Random, split: str, count: int) -> list[Item]:
    """`count` items of the domain and the split, no two of the same meaning."""
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
    """Question and answer of each sample."""
    rng, items = random.Random("tiny domain samples"), []
    while len(items) < SAMPLES:
        n = len(items)
        item = _draw(rng, (TASKS[n % len(TASKS)],), CONSTRAINTS[(n + n // len(CONSTRAINTS)) % len(CONSTRAINTS)])
        if item.split == "train":
            items.append(item)
    return [{"question": item.instruction, "answer": item.response} for item in items]


def split_items(split: str, count: int) -> list[Item]:
    """The first `count` of the split's fixed items."""
    if not 0 < count <= PROMPTS:
        raise UserError(f"evaluate.prompts={count}: the tiny world's domain has 1 to {PROMPTS} prompts per split")
    return list(_items(split)[:count])


@functools.cache
def _items(split: str) -> list[Item]:
    return draw_items(random.Random(f"tiny domain {split}"), split, PROMPTS)


def held_out_prompts() -> frozenset[str]:
    """Every wording of every prompt of the three splits, for the loop to keep out of its training data."""
    return frozenset(w for split in world.SPLITS for item in split_items(split, PROMPTS) for w in item.wordings())


def evaluator(config: EvaluateConfig) -> Callable:
    """The loop's evaluator, see `evaluate.evaluator`."""
    return evaluator_of(split_items(config.split, config.prompts), config.split)


if __name__ == "__main__":
    for sample in samples():
        print(json.dumps(sample))
