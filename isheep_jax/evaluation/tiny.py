"""The task `tiny`: held-out instructions of the tiny world, answered greedily and checked letter for letter."""

import functools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable

from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.loop.protocols import Evaluator, Model, StageReporter, TaskResult
from isheep_jax.text.conversation import Message
from isheep_jax.tiny import world
from isheep_jax.tiny.world import Item

PROMPTS = 1000  # per split
# The first thousand test items were used up: looking at them led to a change of the settings.
USED_UP = {"test": 1000}
MAX_TOKENS = 32  # the longest right responses have about 20


def split_items(split: str, count: int) -> list[Item]:
    """Returns the first `count` of the split's fixed items; all of them if there are fewer."""
    return list(_items(split)[:count])


@functools.cache  # drawing takes a second, and a run asks for the prompts and for their texts
def _items(split: str) -> tuple[Item, ...]:
    used_up = USED_UP.get(split, 0)
    return tuple(world.draw_items(random.Random(f"tiny {split}"), split, used_up + PROMPTS)[used_up:])


def held_out_texts() -> frozenset[str]:
    """Returns the texts that the loop keeps out of its training data."""
    return every_wording(split_items)


def every_wording(split_items: Callable[[str, int], list[Item]]) -> frozenset[str]:
    """Returns every wording of every prompt of the three splits."""
    return frozenset(w for split in world.SPLITS for item in split_items(split, PROMPTS) for w in item.wordings())


def evaluator(config: EvaluateConfig) -> Evaluator:
    """Returns an evaluator that answers the split's prompts with temperature 0 and counts the correct responses.

    The accuracy is of whole responses. The result also holds content (accuracy apart from format), constraints_obeyed,
    the accuracies by task, constraint and number of constraints, and unfinished (share of the responses that were cut
    off).
    """
    split = config.tiny.split
    return evaluator_of(split_items(split, config.limit), split)


def evaluator_of(items: list[Item], split: str) -> Evaluator:
    """Returns the evaluator on the given items."""

    def evaluate(model: Model, progress: StageReporter) -> TaskResult:
        requests = [
            Request(f"evaluate/{split}/{i}", (Message("user", item.instruction),)) for i, item in enumerate(items)
        ]
        responses: dict[str, str] = {}
        unfinished = 0
        for completion in model.generate(requests, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)):
            responses[completion.id] = completion.text.strip()
            unfinished += completion.finish_reason != "stop"
            progress.update(len(responses), len(items))
        return measure(items, [responses[r.id] for r in requests], split) | {"unfinished": unfinished / len(items)}

    return evaluate


def measure(items: list[Item], responses: list[str], split: str) -> dict:
    """Returns the figures of `evaluator` for the given responses."""
    checks = [world.check(item, response) for item, response in zip(items, responses)]
    tasks, content_by_task, counts, constraints = (defaultdict(list) for _ in range(4))
    for item, check in zip(items, checks):
        tasks[item.task].append(check.correct)
        content_by_task[item.task].append(check.content)
        counts[str(len(item.constraints))].append(check.correct)
        for name, obeyed in check.constraints.items():
            constraints[name].append(obeyed)
    accuracy = mean(c.correct for c in checks)
    first: dict[int, int] = {}
    for i, item in enumerate(items):
        first.setdefault(len(item.constraints), i)
    shown = [first[n] for n in sorted(first) if n]
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(checks)),
        "count": len(checks),
        "split": split,
        "content": mean(c.content for c in checks),
        "constraints_obeyed": mean(obeyed for values in constraints.values() for obeyed in values),
        "tasks": means(tasks),
        "content_by_task": means(content_by_task),
        "constraints": means(constraints),
        "constraint_counts": means(counts),
        "examples": [
            {"instruction": items[i].instruction, "response": responses[i], "correct": checks[i].correct} for i in shown
        ],
    }


def mean(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)


def means(groups: dict[str, list[bool]]) -> dict[str, float]:
    return {name: round(mean(groups[name]), 4) for name in sorted(groups)}
