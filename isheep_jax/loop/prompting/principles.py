"""Prompts for responses by principles: the model writes thoughts first, then the answer (SELF-ALIGN, section 3.2).

The prompt holds the rules of good answers and a few conversations in which an assistant follows them. The completion is
parsed and filtered here. Neither the prompt nor the thoughts are trained on, only the answers; that engraves the rules
into the model (section 3.3).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.decode.requests import Request
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.filters.verdicts import EMPTY, NO_ANSWER, NO_THOUGHTS
from isheep_jax.loop.prompting.protocols import ParsedResponse
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.records import Instruction
from isheep_jax.text_files import read_object

# Fewest words of a clause that counts as repeated; shorter ones may occur twice in a good answer.
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

# How principles.json looks.
_LIKE = '{"stop": ["..."], "thoughts": "...", "answer": "...", "least_characters": 0, "leaks": ["..."]}'


@dataclass(frozen=True)
class Form:
    """The marks of the parts of a principles prompt: the file principles.json next to the template.

    stop: strings that end an answer, such as the user's label. thoughts: text that thoughts must contain, ignoring
    case; "" if any will do. answer: the label between thoughts and answer; "" if there are no thoughts.
    least_characters: smallest length of an answer. leaks: words of the examples that belong in no other answer.
    """

    stop: tuple[str, ...] = ()
    thoughts: str = ""
    answer: str = ""
    least_characters: int = 0
    leaks: tuple[str, ...] = ()


def read_form(path: Path) -> Form:
    """Reads a `Form`. Raises UserError when the file does not describe one."""
    values = read_object(path, "prompts", _LIKE)
    try:
        form = Form(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        texts = [form.thoughts, form.answer, *form.stop, *form.leaks]
        good = all(isinstance(text, str) for text in texts) and isinstance(form.least_characters, int)
        good = good and isinstance(form.stop, tuple) and isinstance(form.leaks, tuple)
    except TypeError:
        good = False
    if not good:
        raise UserError(f"prompts: {path} should be like {_LIKE}")
    return form


class Principles:
    """The prompts, and the parser of their completions. Raises UserError when principles.json is malformed."""

    def __init__(self, templates: Templates):
        self._templates = templates
        self._form = read_form(templates.directory / "principles.json")

    @property
    def stop(self) -> tuple[str, ...]:
        return self._form.stop

    def request(self, id: str, instruction: Instruction) -> Request:
        prompt = self._templates.render("principles", instruction=instruction.instruction, input=instruction.input)
        return Request(id, prompt, self._templates.prefix("principles"))

    def parse(self, text: str, instruction: Instruction) -> ParsedResponse:
        """Returns the thoughts (None if the form has none), the answer, and why the answer is dropped or None."""
        form, thoughts = self._form, None
        if form.answer:
            thoughts, label, answer = text.partition(form.answer)
            thoughts = thoughts.strip()
            if not label:
                return ParsedResponse(thoughts, "", NO_ANSWER)
            if not thoughts or form.thoughts.lower() not in thoughts.lower():
                return ParsedResponse(thoughts, answer.strip(), NO_THOUGHTS)
            if form.answer in answer:
                return ParsedResponse(thoughts, answer.strip(), "leftover of the form")
        else:
            answer = text
        answer = until_repeated(clean(answer))
        reason = self._reason(answer, f"{instruction.instruction}\n{instruction.input}")
        return ParsedResponse(thoughts, answer, reason)

    def _reason(self, answer: str, task: str) -> str | None:
        if not answer:
            return EMPTY
        if len(answer) < self._form.least_characters:
            return "too short"
        if _APOLOGY.match(answer):
            return "opens with an apology"
        if any(_says(answer, leak) and not _says(task, leak) for leak in self._form.leaks):
            return "leak from the examples"
        return None


def clean(answer: str) -> str:
    """Strips white space around an answer, and a preamble that names an encyclopedia."""
    answer = answer.strip()
    if match := _PREAMBLE.match(answer):
        answer = answer[match.end() :]
        answer = answer[:1].upper() + answer[1:]
    return answer


def until_repeated(answer: str) -> str:
    """Returns the sentences before the first one with a repeated clause."""
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
