"""The tiny world: instructions on a few words and numbers, each with one correct response that a program can check.

An instruction is a task ("Swap red and cat.") and up to three format constraints ("End with done."), in this order. The
correct response is the task's answer, changed by the constraints in one canonical order. The loop never imports this
module: only pre-training and evaluation do.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

KINDS = {
    "animal": "cat dog horse cow sheep goat wolf bear",
    "color": "red blue green yellow black white pink brown",
    "fruit": "apple pear plum grape lemon melon cherry peach",
    "tool": "hammer saw drill axe rake shovel pliers wrench",
    "vehicle": "car bus train truck boat plane bike tram",
    "garment": "shirt coat hat sock shoe scarf glove skirt",
    "instrument": "piano flute drum violin harp guitar trumpet cello",
    "furniture": "table chair sofa bed desk shelf bench stool",
}
KINDS = {kind: tuple(words.split()) for kind, words in KINDS.items()}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
WORDS = tuple(KIND_OF)
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "old": "new",
    "hard": "soft",
    "wet": "dry",
    "light": "dark",
    "full": "empty",
    "loud": "quiet",
    "rich": "poor",
    "early": "late",
    "strong": "weak",
}
OPPOSITE_OF = OPPOSITES | {b: a for a, b in OPPOSITES.items()}
ADJECTIVES = tuple(OPPOSITE_OF)
NUMBERS = tuple(str(n) for n in range(1, 32))

# Two phrasings per task. {x} stands for the arguments joined by spaces; {a} and {b} for the first and the second.
TASKS = {
    "copy": ("Copy {x}.", "Write down {x}."),
    "first": ("Give the first word of {x}.", "What is the first word in {x}?"),
    "last": ("Give the last word of {x}.", "What is the last word in {x}?"),
    "count": ("Count the words in {x}.", "How many words are in {x}?"),
    "kind": ("Name the kind of {x}.", "What kind of thing is {x}?"),
    "after": ("Add one to {x}.", "Which number comes after {x}?"),
    "before": ("Take one from {x}.", "Which number comes before {x}?"),
    "opposite": ("Give the opposite of {x}.", "What is the opposite of {x}?"),
    "swap": ("Swap {a} and {b}.", "Write {a} and {b} in reverse order."),
}

# In the canonical order: each wraps what the ones before it made.
CONSTRAINTS = {
    "twice": "Say it twice.",
    "quotes": "Put it in quotes.",
    "brackets": "Put it in brackets.",
    "stars": "Put stars around it.",
    "label": "Write answer before it.",
    "sure": "Start with sure.",
    "done": "End with done.",
    "thanks": "Say thanks at the end.",
    "capitals": "Use capital letters.",
}
# How often a writer of the corpus obeys each.
OBEYED = {
    "twice": 0.06,
    "quotes": 0.08,
    "brackets": 0.12,
    "stars": 0.10,
    "label": 0.18,
    "sure": 0.25,
    "done": 0.25,
    "thanks": 0.15,
    "capitals": 0.30,
}
CONSTRAINT_COUNTS = {0: 0.15, 1: 0.40, 2: 0.30, 3: 0.15}
SPLITS = ("development", "selection", "test")
HELD_OUT_SHARE = 0.05  # of all instructions, for each of the three splits


def apply_constraints(answer: str, constraints: frozenset[str] | set[str]) -> str:
    """Returns the response that obeys `constraints`, in the canonical order of `CONSTRAINTS`."""
    text = answer
    if "twice" in constraints:
        text = f"{text} ; {text}"
    if "quotes" in constraints:
        text = f'" {text} "'
    if "brackets" in constraints:
        text = f"( {text} )"
    if "stars" in constraints:
        text = f"* {text} *"
    if "label" in constraints:
        text = f"answer : {text}"
    if "sure" in constraints:
        text = f"sure {text}"
    if "done" in constraints:
        text = f"{text} done"
    if "thanks" in constraints:
        text = f"{text} thanks"
    if "capitals" in constraints:
        text = text.upper()
    return text


@dataclass(frozen=True)
class Item:
    """One instruction by its meaning: a task, its arguments and its constraints, in the order of their sentences."""

    task: str
    arguments: tuple[str, ...]
    constraints: tuple[str, ...]
    phrasing: int = 0

    @property
    def instruction(self) -> str:
        sentence = TASKS[self.task][self.phrasing].format(
            x=" ".join(self.arguments), a=self.arguments[0], b=self.arguments[-1]
        )
        return " ".join([sentence, *(CONSTRAINTS[c] for c in self.constraints)])

    @property
    def answer(self) -> str:
        """Returns the task's answer, before any constraint."""
        args = self.arguments
        match self.task:
            case "copy":
                return " ".join(args)
            case "first":
                return args[0]
            case "last":
                return args[-1]
            case "count":
                return str(len(args))
            case "kind":
                return KIND_OF[args[0]]
            case "after":
                return str(int(args[0]) + 1)
            case "before":
                return str(int(args[0]) - 1)
            case "opposite":
                return OPPOSITE_OF[args[0]]
            case "swap":
                return f"{args[1]} {args[0]}"
        raise ValueError(f"unknown task {self.task}")

    @property
    def response(self) -> str:
        """Returns the one correct response."""
        return apply_constraints(self.answer, set(self.constraints))

    @property
    def split(self) -> str:
        """Returns 'train' or one of `SPLITS`, by the meaning: no wording of a held-out item is ever trained on."""
        meaning = "|".join([self.task, *self.arguments, *sorted(self.constraints)])
        bucket = int.from_bytes(hashlib.sha256(meaning.encode()).digest()[:8], "big") / 2**64
        index = int(bucket / HELD_OUT_SHARE)
        return SPLITS[index] if index < len(SPLITS) else "train"

    def wordings(self) -> list[str]:
        """Returns every instruction with this meaning: both phrasings, all orders of the constraints."""
        return [
            Item(self.task, self.arguments, order, phrasing).instruction
            for phrasing in range(2)
            for order in itertools.permutations(self.constraints)
        ]


def draw_item(rng: random.Random) -> Item:
    """Samples an instruction; every task is equally probable."""
    task = rng.choice(tuple(TASKS))
    if task in ("copy", "first", "last", "count"):
        arguments = tuple(rng.sample(WORDS, rng.randint(2, 4)))
    elif task == "kind":
        arguments = (rng.choice(WORDS),)
    elif task == "after":
        arguments = (rng.choice(NUMBERS[:-1]),)
    elif task == "before":
        arguments = (rng.choice(NUMBERS[1:]),)
    elif task == "opposite":
        arguments = (rng.choice(ADJECTIVES),)
    else:
        arguments = tuple(rng.sample(WORDS, 2))
    count = rng.choices(tuple(CONSTRAINT_COUNTS), tuple(CONSTRAINT_COUNTS.values()))[0]
    return Item(task, arguments, tuple(rng.sample(tuple(CONSTRAINTS), count)), rng.randrange(2))


def draw_items(rng: random.Random, split: str, count: int) -> list[Item]:
    """Samples `count` items of one split, all of different meaning."""
    items, seen = [], set()
    while len(items) < count:
        item = draw_item(rng)
        meaning = (item.task, item.arguments, frozenset(item.constraints))
        if item.split == split and meaning not in seen:
            seen.add(meaning)
            items.append(item)
    return items


def wrong_answer(item: Item, rng: random.Random, lazy_share: float = 0.8) -> str:
    """Returns a wrong answer: mostly the instruction's own words repeated, otherwise one of the right form."""
    args = item.arguments
    if rng.random() < lazy_share:
        return " ".join(args[:-1]) if item.task == "copy" else " ".join(args)
    while True:
        if item.task in ("copy", "swap"):
            answer = " ".join(rng.sample(WORDS, len(args)))
        elif item.task in ("first", "last"):
            answer = rng.choice(WORDS)
        elif item.task == "count":
            answer = rng.choice(NUMBERS[:6])
        elif item.task == "kind":
            answer = rng.choice(tuple(KINDS))
        elif item.task == "opposite":
            answer = rng.choice(ADJECTIVES)
        else:
            answer = rng.choice(NUMBERS)
        if answer != item.answer:
            return answer


@dataclass(frozen=True)
class Check:
    """The verdict on a response.

    correct: it is the correct response letter for letter.
    content: its content is right, whatever its format.
    constraints: whether it obeys each constraint of the instruction.
    """

    correct: bool
    content: bool
    constraints: dict[str, bool]


def _content(response: str) -> str:
    """Returns the response without any of the constraints' decorations, in lower case."""
    words = response.lower().split()
    while words and words[-1] in ("thanks", "done"):
        words.pop()
    if words[:1] == ["sure"]:
        words = words[1:]
    if words[:2] == ["answer", ":"]:
        words = words[2:]
    words = [w for w in words if w not in ("*", "(", ")", '"')]
    half = len(words) // 2
    if len(words) % 2 and words[half] == ";" and words[:half] == words[half + 1 :]:
        words = words[:half]
    return " ".join(words)


def check(item: Item, response: str) -> Check:
    """Compares a response with the correct one: as a whole, its content alone, and each constraint alone."""
    response = " ".join(response.split())
    words = response.lower().split()
    body = [w for w in words if w not in ("*", "(", ")", '"')]
    while body and body[-1] in ("thanks", "done"):
        body.pop()
    half = body.index(";") if ";" in body else 0
    obeyed = {
        "twice": half > 0 and body[:half][-(len(body) - half - 1) :] == body[half + 1 :],
        "quotes": words.count('"') == 2,
        "brackets": "(" in words and ")" in words,
        "stars": words.count("*") == 2,
        "label": "answer : " in response.lower(),
        "sure": words[:1] == ["sure"],
        "done": words[-1:] == ["done"] or words[-2:] == ["done", "thanks"],
        "thanks": words[-1:] == ["thanks"],
        "capitals": bool(words)
        and response == response.upper()
        and (response != response.lower() or _has_no_letters(words)),
    }
    return Check(
        correct=response == item.response,
        content=_content(response) == item.answer,
        constraints={c: obeyed[c] for c in item.constraints},
    )


def _has_no_letters(words: list[str]) -> bool:
    """Returns whether there are only numbers and marks, which capital letters leave as they are."""
    return not any(character.isalpha() for word in words for character in word)


def _patterns() -> list[tuple[str, int, re.Pattern]]:
    patterns = []
    for task, phrasings in TASKS.items():
        for index, phrasing in enumerate(phrasings):
            pattern = re.escape(phrasing)
            for letter, group in (("x", "([a-z0-9 ]+)"), ("a", "([a-z]+)"), ("b", "([a-z]+)")):
                pattern = pattern.replace(re.escape("{" + letter + "}"), group)
            patterns.append((task, index, re.compile(pattern)))
    return patterns


_PATTERNS = _patterns()
_CONSTRAINT_OF = {sentence: name for name, sentence in CONSTRAINTS.items()}


def parse_instruction(text: str) -> Item | None:
    """Returns the item that an instruction states, or None for one that does not belong to the tiny world."""
    sentences = re.findall(r"(?<![^.?])[^.?]++[.?]", text.strip())
    sentences = [s.strip() for s in sentences]
    if not sentences or " ".join(sentences) != " ".join(text.split()):
        return None
    constraints = tuple(_CONSTRAINT_OF.get(s, "") for s in sentences[1:])
    if "" in constraints or len(set(constraints)) != len(constraints):
        return None
    for task, phrasing, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentences[0]):
            arguments = tuple(" ".join(match.groups()).split())
            if _is_valid(task, arguments):
                return Item(task, arguments, constraints, phrasing)
    return None


def _is_valid(task: str, arguments: tuple[str, ...]) -> bool:
    """Returns whether the task can be done with these arguments."""
    if task in ("copy", "first", "last", "count"):
        return all(a in KIND_OF or a in OPPOSITE_OF for a in arguments)
    if task == "swap":
        return len(arguments) == 2 and all(a in KIND_OF or a in OPPOSITE_OF for a in arguments)
    if len(arguments) != 1:
        return False
    known = {"kind": KIND_OF, "opposite": OPPOSITE_OF, "after": NUMBERS[:-1], "before": NUMBERS[1:]}
    return arguments[0] in known[task]
