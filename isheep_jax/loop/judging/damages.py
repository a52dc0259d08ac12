"""Ways to damage a good response, each a row of `DAMAGES`, so that pairs of a known order check a judge."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.errors import UserError
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.text_files import read_object

# File of a prompts directory with the texts of those damages that do not look at the response.
TEXTS_FILE = "damages.json"

# First words of a response that go round in a loop, and those that follow the instruction in half an echo (count).
_LOOP_WORDS = 12
_HALF_ECHO_WORDS = 20
# A loop goes round at least so often.
_LOOP_ROUNDS = 3
# Part of the words that is left of a truncated response (0 to 1).
_TRUNCATED = (0.3, 0.7)
# Fewest words that are left of it (count).
_MIN_WORDS = 2
_SENTENCE_END = tuple(".!?:;")
_MARK = re.compile(r"[^\w\s]|\n")


@dataclass(frozen=True)
class Material:
    """What a damage is made of.

    seed: the task with its good output. others: the other tasks. texts: answers that fit no task, by kind of damage.
    rng: random numbers of this damage of this seed.
    """

    seed: Seed
    others: Sequence[Seed]
    texts: Mapping[str, Sequence[str]]
    rng: random.Random

    @property
    def words(self) -> list[str]:
        return self.seed.output.split()


@dataclass(frozen=True)
class Damage:
    """One kind of damage. make: returns the damaged response, or None for a seed that it does not apply to."""

    describe: str
    make: Callable[[Material], str | None]


def damaged(seed: Seed, others: Sequence[Seed], texts: Mapping[str, Sequence[str]], random_seed: int) -> dict[str, str]:
    """Returns the damaged responses of a seed by kind, without those that do not apply to it or change nothing.

    Args:
        seed: A seed with an output.
        others: The other seeds with outputs.
        texts: Of `read_texts`.
        random_seed: Decides the random numbers, together with the kind and the seed's id.
    """
    responses = {}
    for kind, damage in DAMAGES.items():
        rng = random.Random(f"{random_seed}/{kind}/{seed.id}")
        response = damage.make(Material(seed, [other for other in others if other.id != seed.id], texts, rng))
        if response and _collapsed(response) != _collapsed(seed.output):
            responses[kind] = response
    return responses


def read_texts(directory: Path) -> dict[str, list[str]]:
    """Returns the texts of a prompts directory by kind of damage; none without the file `TEXTS_FILE`.

    Raises UserError where the file holds anything else.
    """
    path = directory / TEXTS_FILE
    if not path.exists():
        return {}
    like = f'{{"{_OF_TEXTS[0]}": ["...", "..."]}}'
    texts = read_object(path, "prompts", like)
    for kind, values in texts.items():
        if kind not in _OF_TEXTS:
            raise UserError(f"prompts: {path}: {kind!r} is none of the kinds {', '.join(_OF_TEXTS)}")
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise UserError(f"prompts: {path} should be like {like}")
    return texts


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _mismatch(material: Material) -> str | None:
    return material.rng.choice(material.others).output if material.others else None


def _shuffled(material: Material) -> str | None:
    words = material.words
    if len(set(words)) < 2:
        return None
    shuffled = list(words)
    while shuffled == words:
        material.rng.shuffle(shuffled)
    return " ".join(shuffled)


def _looping(material: Material) -> str:
    words = material.words
    opening = words[:_LOOP_WORDS]
    return " ".join(opening * max(_LOOP_ROUNDS, -(-len(words) // len(opening))))


def _echo(material: Material) -> str:
    return material.seed.instruction


def _half_echo(material: Material) -> str:
    return " ".join([material.seed.instruction, *material.words[:_HALF_ECHO_WORDS]])


def _truncated(material: Material) -> str | None:
    """Cuts after a word that ends no sentence."""
    words = material.words
    low, high = (int(part * len(words)) for part in _TRUNCATED)
    ends = [n for n in range(max(low, _MIN_WORDS), high + 1) if not words[n - 1].endswith(_SENTENCE_END)]
    if not ends:
        return None
    # The words alone would lose the line breaks of what is left.
    last = list(re.finditer(r"\S+", material.seed.output))[material.rng.choice(ends) - 1]
    return material.seed.output[: last.end()].lstrip()


def _broken_format(material: Material) -> str | None:
    """Loses every mark and line break, where there are some within the response."""
    marks = len(_MARK.findall(material.seed.output.strip()[:-1]))
    return _collapsed(_MARK.sub(" ", material.seed.output)) if marks > 1 else None


def _text(kind: str) -> Callable[[Material], str | None]:
    def make(material: Material) -> str | None:
        return material.rng.choice(material.texts[kind]) if material.texts.get(kind) else None

    return make


DAMAGES = {
    "mismatch": Damage("the output of another task", _mismatch),
    "shuffled": Damage("its words in random order", _shuffled),
    "looping": Damage("its first words again and again", _looping),
    "echo": Damage("the instruction itself", _echo),
    "half echo": Damage("the instruction, then its first words", _half_echo),
    "truncated": Damage("it breaks off", _truncated),
    "generic": Damage("words that fit any task", _text("generic")),
    "refusal": Damage("a refusal", _text("refusal")),
    "broken format": Damage("it has lost its punctuation and line breaks", _broken_format),
    "wrong language": Damage("words in another language", _text("wrong language")),
}
_OF_TEXTS = ("generic", "refusal", "wrong language")
