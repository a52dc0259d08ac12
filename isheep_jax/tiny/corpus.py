"""The corpus of the tiny base model: a small, noisy web of task lists, questions with answers, and graded reviews.

Its writers mostly get the content right, ignore most format constraints (each is obeyed at its own rate,
`world.OBEYED`) and grade with noise. A base model trained on this knows more than it shows: the loop builds on nothing
else.
"""

import random
from collections.abc import Iterator

from isheep_jax.tiny import world
from isheep_jax.tiny.world import Item

DOCUMENTS = {"list": 0.05, "answer": 0.42, "review": 0.53}
CONTENT_RIGHT = 0.85  # probability that an average writer gets the content right
ANSWER_FORMS = (
    "Question: {instruction}\nAnswer: {response}",
    "Q: {instruction}\nA: {response}",
    "Task: {instruction}\nResult: {response}",
)
CHAT_FORM = "<|user|> {instruction}<|assistant|> {response}<|end|>"  # as in chat_template.jinja
CHAT_SHARE = 0.4
LIST_ITEM = "### Instruction: {instruction}\n"  # as in prompts/synthesize.jinja
REVIEW = (
    "### Review\nInstruction: {instruction}\nResponse: {response}\n{first}\n{second}"  # as in prompts/quality.jinja
)
QUALITY_MEAN = {True: 9.0, False: 2.5}
FOLLOWING_MEAN = (9.0, 5.0, 3.0, 2.0)  # by the number of constraints that the response ignores
GRADE_DEVIATION = 1.2
GRADE_UNIFORM = 0.05  # share of grades drawn at random from 1 to 10


def web_response(item: Item, rng: random.Random) -> str:
    """Samples a writer's answer. A careful one has twice an average one's odds of being right, a sloppy one half."""
    care = rng.choice((0.5, 1.0, 2.0))
    answer = item.answer if rng.random() < scale_odds(CONTENT_RIGHT, care) else world.wrong_answer(item, rng)
    obeyed = {c for c in item.constraints if rng.random() < scale_odds(world.OBEYED[c], care)}
    return world.apply_constraints(answer, obeyed)


def scale_odds(probability: float, factor: float) -> float:
    """Returns the probability whose odds are `factor` times those of `probability`."""
    odds = factor * probability / (1 - probability)
    return odds / (1 + odds)


def graded_response(item: Item, rng: random.Random) -> tuple[str, bool, int]:
    """Samples a response for a review, whether its content is right, and how many constraints it ignores."""
    right = rng.random() < 0.5
    answer = item.answer if right else world.wrong_answer(item, rng, lazy_share=0.6)
    if rng.random() < 0.4:
        obeyed = set(item.constraints)
    else:
        keep = rng.random()
        obeyed = {c for c in item.constraints if rng.random() < keep}
    return world.apply_constraints(answer, obeyed), right, len(item.constraints) - len(obeyed)


def grade(mean: float, rng: random.Random) -> int:
    """Samples a noisy grade from 1 to 10."""
    if rng.random() < GRADE_UNIFORM:
        return rng.randint(1, 10)
    return min(10, max(1, round(rng.gauss(mean, GRADE_DEVIATION))))


def training_item(rng: random.Random) -> Item:
    """Samples an item that is not held out."""
    while True:
        item = world.draw_item(rng)
        if item.split == "train":
            return item


def document(rng: random.Random) -> str:
    """Samples a document of the corpus. Held-out instructions never appear."""
    form = rng.choices(tuple(DOCUMENTS), tuple(DOCUMENTS.values()))[0]
    if form == "list":
        return "".join(LIST_ITEM.format(instruction=training_item(rng).instruction) for _ in range(rng.randint(4, 6)))
    item = training_item(rng)
    if form == "answer":
        template = CHAT_FORM if rng.random() < CHAT_SHARE else rng.choice(ANSWER_FORMS)
        return template.format(instruction=item.instruction, response=web_response(item, rng))
    response, right, ignored = graded_response(item, rng)
    scores = [
        f"Quality (1-10): {grade(QUALITY_MEAN[right], rng)}",
        f"Following (1-10): {grade(FOLLOWING_MEAN[ignored], rng)}",
    ]
    rng.shuffle(scores)
    return REVIEW.format(instruction=item.instruction, response=response, first=scores[0], second=scores[1])


def documents(seed: int) -> Iterator[str]:
    """Yields documents without end."""
    rng = random.Random(f"tiny corpus {seed}")
    while True:
        yield document(rng)
