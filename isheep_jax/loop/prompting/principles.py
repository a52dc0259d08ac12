"""Responses by principles: thoughts first, then the answer, which alone goes on (SELF-ALIGN, section 3.2).

The prompt holds the rules of good answers and a few conversations in which an assistant keeps them. What the model adds
is read and filtered here; neither the prompt nor the thoughts are ever trained on, which engraves the rules into the
model (section 3.3).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.decode.requests import Request
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.records import Instruction

# A clause of fewer words may come twice in a good answer.
REPEATED_WORDS = 5

_SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?。！？\n]+|$)")
_CLAUSE = re.compile(r"[,;:，；：]")
_APOLOGY = re.compile(
    r"(oh,?\s+)?((i am|i['’]m|we are)\s+)?((very|so|really|truly|deeply)\s+)?sorry\b(?!\s+(is|was|means|comes)\b)"
    r"|(my|our)\s+(\w+\s+)?apolog|(i|we)\s+(must\s+|do\s+)?apologi|apologies\b",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"(according to|as (stated|described) (in|by|on)) (the )?(wikipedia|encyclop\w+)[^,.]{0,20},\s*", re.I
)


@dataclass(frozen=True)
class Form:
    """How a principles prompt marks its parts; the file principles.json beside it.

    stop: strings that end an answer, such as the user's label. thoughts: what thoughts must say, in any case; "" where
    any will do. answer: the label between thoughts and answer; "" where the answer comes at once, without thoughts.
    least_characters: of an answer. leaks: words of the examples, which belong into no other answer.
    """

    stop: tuple[str, ...] = ()
    thoughts: str = ""
    answer: str = ""
    least_characters: int = 0
    leaks: tuple[str, ...] = ()


def read_form(path: Path) -> Form:
    """Raises UserError when the file is not like a `Form`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        form = Form(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        texts = [form.thoughts, form.answer, *form.stop, *form.leaks]
        good = all(isinstance(text, str) for text in texts) and isinstance(form.least_characters, int)
        good = good and isinstance(form.stop, tuple) and isinstance(form.leaks, tuple)
    except (OSError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f'prompts: {path} should be like {{"stop": ["..."], "thoughts": "...", "answer": "...", '
            '"least_characters": 0, "leaks": ["..."]}'
        )
    return form


class Principles:
    """The prompt and what is read from its completions. Raises UserError when the templates' form is none."""

    def __init__(self, templates: Templates):
        self._templates = templates
        self._form = read_form(templates.directory / "principles.json")

    @property
    def stop(self) -> tuple[str, ...]:
        return self._form.stop

    def request(self, id: str, instruction: Instruction) -> Request:
        prompt = self._templates.answer("principles", instruction.instruction, instruction.input)
        return Request(id, prompt, self._templates.prefix("principles"))

    def read(self, text: str, instruction: Instruction) -> tuple[str | None, str, str | None]:
        """(thoughts, or None where the form has none; answer; why the answer is dropped, or None)."""
        form, thoughts = self._form, None
        if form.answer:
            thoughts, label, answer = text.partition(form.answer)
            thoughts = thoughts.strip()
            if not label:
                return thoughts, "", "no answer"
            if not thoughts or form.thoughts.lower() not in thoughts.lower():
                return thoughts, answer.strip(), "no thoughts"
            if form.answer in answer:
                return thoughts, answer.strip(), "leftover of the form"
        else:
            answer = text
        answer = until_repeated(clean(answer))
        return thoughts, answer, self._reason(answer, f"{instruction.instruction}\n{instruction.input}")

    def _reason(self, answer: str, asked: str) -> str | None:
        if not answer:
            return "empty"
        if len(answer) < self._form.least_characters:
            return "too short"
        if _APOLOGY.match(answer):
            return "opens with an apology"
        if any(_says(answer, leak) and not _says(asked, leak) for leak in self._form.leaks):
            return "leak from the examples"
        return None


def clean(answer: str) -> str:
    """The answer without white space around it and without a preamble that names an encyclopedia."""
    answer = answer.strip()
    if match := _PREAMBLE.match(answer):
        answer = answer[match.end() :]
        answer = answer[:1].upper() + answer[1:]
    return answer


def until_repeated(answer: str) -> str:
    """The whole sentences in front of the first clause that was there before."""
    said: set[str] = set()
    end = 0
    for sentence in _SENTENCE.finditer(answer):
        for clause in map(normalize, _CLAUSE.split(sentence[0])):
            if len(clause.split()) >= REPEATED_WORDS:
                if clause in said:
                    return answer[:end].strip()
                said.add(clause)
        end = sentence.end()
    return answer


def _says(text: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text, re.IGNORECASE) is not None
