"""Rules that drop what weak base models write in the place of a task (`synthesize.rules=strict`).

They are made for English, and for tasks that stand alone: a follow-up such as "Make it shorter." names no content.
"""

import re
from collections import Counter
from collections.abc import Callable

from isheep_jax.loop.filters.normalization import tokenize

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_PLACEHOLDER = re.compile(r"[<\[{(](?:insert|your|enter|add)\b[^\n>\])}]{0,40}[>\])}]|lorem ipsum", re.IGNORECASE)
# An input that is nothing but a name in brackets, or has no letter or digit.
_STANDS_FOR_INPUT = re.compile(r"[<\[{][^<>\[\]{}\n\d]{1,40}[>\]}]|\W+|_+|x{3,}", re.IGNORECASE)
_ONLY_NUMBERS = re.compile(r"(?=\D*\d)[\d\s.,;:/%$€£+*()-]+")
_ABOUT_NUMBERS = re.compile(
    r"\d|\b(?:numbers?|numeric\w*|digits?|integers?|sums?|add\w*|totals?|averages?|means?|medians?|modes?|multipl\w+|"
    r"product|subtract\w*|divi\w+|differences?|percent\w*|fractions?|decimals?|roots?|squares?|primes?|even|odd|round\w*|"
    r"convert\w*|calculat\w+|comput\w+|solve|equations?|expressions?|sequences?|series|next|sort\w*|order\w*|rank\w*|"
    r"largest|smallest|highest|lowest|greatest|biggest|temperatures?|prices?|costs?|dates?|years?|ages?|times?|"
    r"scores?|values?|amounts?|quantit\w+|measure\w*|data|list|table|code|phone)\b",
    re.IGNORECASE,
)
# Words that refer to something or say only that there is a task.
_EMPTY_WORDS = frozenset(
    tokenize(
        """
        a an the this that these those it its itself what which who whom whose when where why how
        is are was were be been being am do does did done doing have has had having will would can could shall should
        may might must i you he she we they me him her us them my your his our their mine yours myself yourself
        and or but if then so than to of in on at by for with from about into as not no yes all any some each every both
        one ones other others thing things something anything everything nothing someone anyone everyone way ways
        answer answers question questions task tasks instruction instructions input output response example
        following above below given here there now today tomorrow yesterday again please just only also more most very
        tell say said give make get take go let know think want need try use see look find show put keep come
        write list explain describe name choose pick select complete provide add correct new same different good best
        true false many much long next s t re ll d m ve don doesn isn
        """
    )
)
_THINGS = (
    "sentences?|text|paragraphs?|passages?|articles?|lists?|words?|numbers?|notes?|emails?|code|poems?|stor(?:y|ies)|"
    "statements?|reviews?|phrases?|dialogues?|tables?"
)
_REFERS = re.compile(
    r"\b(?:the following|(?:the|this|these|each|an?) (?:given|provided)|(?:given|provided|shown|listed) "
    rf"(?:below|above|here)|(?:this|these|below|above) (?:{_THINGS}))\b",
    re.IGNORECASE,
)
# Where the material is within the instruction: after a colon or a line break, or in quotation marks.
_GIVEN_WITHIN = re.compile(r":\s*\S|\n|[\"“”«`]|(?:^|\s)'|\d")
# Words that begin statements.
_STATES = frozenset(
    tokenize(
        """
        i you he she it we they the a an this that these those there my your his her its our their no yes and but all
        most many some every each one everyone nobody because so maybe perhaps people
        """
    )
)
_WISHES = re.compile(
    r"\b(?:please|needs?|wants?|would like|d like|help|wonder\w*|must|should|tasks?|your (?:job|goal|role))\b"
)
_ANSWER = re.compile(
    r"(?:^|\n|\?)[^\S\n]*(?:(?i:the )?(?i:correct )?(?i:answer|solution)|A)\s*(?::|=|is\b)[ \t]*\S"
    r"|\b(?i:the (?:correct )?answer is)\b"
)
_NUMBERED = re.compile(r"(?:^|\n)[^\S\n]*\d+[^\S\n]*[.):]\s+\S")
_OPEN_WORDS = frozenset(tokenize("the a an and or but your my their its than because if as"))


def junk_reason(instruction: str, input: str) -> str | None:
    """Returns why a text is no task that could be answered, or None; one of a few fixed strings."""
    return next((reason for reason, is_junk in _RULES.items() if is_junk(instruction.strip(), input.strip())), None)


def _loops(instruction: str, input: str) -> bool:
    return _repeats(instruction) or _repeats(input)


def _repeats(text: str) -> bool:
    """Returns whether a word comes three times in a row, or a run of six words or a sentence three times."""
    words = tokenize(text)
    if any(a == b == c and len(a) > 1 and not a.isdigit() for a, b, c in zip(words, words[1:], words[2:])):
        return True
    runs = Counter(zip(*(words[i:] for i in range(6))))
    whole = Counter(s for part in _SENTENCE.split(text) if len(s := tuple(tokenize(part))) > 2)
    return any(n > 2 for n in (*runs.values(), *whole.values()))


def _stands_for_something(instruction: str, input: str) -> bool:
    return bool(_PLACEHOLDER.search(f"{instruction}\n{input}") or _STANDS_FOR_INPUT.fullmatch(input))


def _input_repeats(instruction: str, input: str) -> bool:
    """Returns whether much of the instruction is in the input, or the other way round, by runs of three words."""
    a, b = (_runs(tokenize(text)) for text in (instruction, input))
    return len(a) > 1 and len(b) > 0 and len(a & b) >= 0.4 * min(len(a), len(b))


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:]))


def _bare_numbers(instruction: str, input: str) -> bool:
    return bool(_ONLY_NUMBERS.fullmatch(input)) and not _ABOUT_NUMBERS.search(instruction)


def _names_nothing(instruction: str, input: str) -> bool:
    return not input and _EMPTY_WORDS.issuperset(tokenize(instruction))


def _lacks_input(instruction: str, input: str) -> bool:
    return not input and bool(_REFERS.search(instruction)) and not _GIVEN_WITHIN.search(instruction)


def _asks_nothing(instruction: str, input: str) -> bool:
    """Returns whether every sentence begins like a statement, and none asks or wishes."""
    if "?" in instruction or _WISHES.search(instruction.lower()):
        return False
    starts = [words[0] for part in _SENTENCE.split(instruction) if (words := tokenize(part))]
    return _STATES.issuperset(starts)


def _has_answer(instruction: str, input: str) -> bool:
    return bool(_ANSWER.search(instruction) or _ANSWER.match(input))


def _several(instruction: str, input: str) -> bool:
    """Returns whether a short text asks more than three questions, or several numbered ones."""
    questions = sum(part.rstrip().endswith("?") for part in _SENTENCE.split(instruction))
    several = questions > 3 or (questions > 1 and len(_NUMBERED.findall(instruction)) > 1)
    return several and not input and len(instruction.split()) < 60


def _cut_off(instruction: str, input: str) -> bool:
    if instruction[-1:] in tuple(",;(-–") or (instruction.endswith(":") and not input and "\n" not in instruction):
        return True
    words = tokenize(instruction)
    return instruction[-1:].isalpha() and bool(words) and words[-1] in _OPEN_WORDS


_RULES: dict[str, Callable[[str, str], bool]] = {
    "loops": _loops,
    "has a placeholder": _stands_for_something,
    "cut off": _cut_off,
    "names no content": _names_nothing,
    "lacks its input": _lacks_input,
    "asks for nothing": _asks_nothing,
    "input repeats the instruction": _input_repeats,
    "bare numbers as input": _bare_numbers,
    "has its answer": _has_answer,
    "several tasks": _several,
}
