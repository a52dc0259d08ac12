"""The task `tiny`: held-out instructions of the tiny world, answered greedily and checked letter for letter."""

import functools
import random
from collections.abc import Callable, Sequence

from isheep_jax.decode.requests import SamplingParams
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.text.conversation import Message
from isheep_jax.tiny import world
from isheep_jax.tiny.world import Item

PROMPTS = 1000  # per split
# The first thousand test items were used up: looking at them led to a change of the settings.
USED_UP = {"test": 1000}
MAX_TOKENS = 32  # the longest right responses have about 20


@functools.cache  # drawing takes a second, and a run asks for the prompts and for their texts
def split_items(split: str) -> tuple[Item, ...]:
    """Returns the split's fixed items, in a random order."""
    used_up = USED_UP.get(split, 0)
    return tuple(world.draw_items(random.Random(f"tiny {split}"), split, used_up + PROMPTS)[used_up:])


def every_wording(split_items: Callable[[str], Sequence[Item]]) -> frozenset[str]:
    """Returns every wording of every prompt of the three splits."""
    return frozenset(w for split in world.SPLITS for item in split_items(split) for w in item.wordings())


def samples_of(items: Sequence[Item], split: str, options: TaskOptions) -> list[Sample]:
    """Returns the items as samples."""
    sampling = SamplingParams(temperature=0.0, max_tokens=options.settings.max_tokens or MAX_TOKENS)
    return [
        Sample(
            f"{split}-{i}",
            (Message("user", item.instruction),) if options.chat else f"{item.instruction}\n",
            sampling,
            reference={"response": item.response},
            groups={"constraints": str(len(item.constraints)), "task": item.task},
        )
        for i, item in enumerate(items)
    ]


def score(pairs: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Scores responses.

    accuracy: the whole response is right. content: it is right apart from its format. constraints_obeyed: of each
    constraint, and constraint_NAME of those of one kind.
    """
    return [_score(response) for _, response in pairs]


def _score(response: Response) -> Score:
    check = world.check(world.parse_instruction(response.prompts[0].strip()), response.text.strip())
    obeyed = check.constraints
    return Score(
        {
            "accuracy": check.correct,
            "content": check.content,
            "constraints_obeyed": list(obeyed.values()),
            **{f"constraint_{name}": value for name, value in obeyed.items()},
        }
    )


def task_of(title: str, section: str, split_items: Callable[[str], Sequence[Item]]) -> Task:
    """Returns the task on items of the tiny world.

    Args:
        title: Of the task.
        section: Name of its settings in `EvaluateConfig`, which say the split.
        split_items: Returns the fixed items of a split, in a random order.
    """

    def samples(options: TaskOptions) -> list[Sample]:
        split = getattr(options.settings, section).split
        return samples_of(split_items(split), split, options)

    return Task(
        title=title,
        version=2,
        samples=samples,
        score=score,
        main="accuracy",
        shown=("content",),
        held_out_texts=lambda: every_wording(split_items),
        random_order=True,
    )


TASK = task_of("tiny world", "tiny", split_items)
