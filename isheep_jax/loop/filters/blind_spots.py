"""Rules against what a reading of a pair does not see: responses that its numbers reward for the wrong reason.

A likelihood rises with each word that is copied or repeated, so a reading made of likelihoods names the rules that it
needs (`READINGS`). Quoting, rewriting and continuing a text are tasks in which copying is right: a rule fires on the
whole pattern only, and not where the instruction asks for it. The rules on echoes and loops know no language; the
others know English, and never fire on another one.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from isheep_jax.loop.filters.normalization import tokenize

ECHO = "echoes the instruction"
HALF_ECHO = "begins with the instruction"
LOOP = "repeats itself"
POLITE = "empty politeness"
BREAKS_OFF = "breaks off"
NO_PUNCTUATION = "no punctuation"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fewest words of an instruction whose repetition is neither a coincidence nor the title of the response.
_MIN_ECHO = 5
# Share of the words of a response that repeat the instruction in an echo.
_ECHO_SHARE = 0.8
# A loop goes round at least so often, and has at least so many words and this share of the response's.
_MIN_ROUNDS = 3
_MIN_LOOP = 8
_LOOP_SHARE = 0.4
# Longest round of a loop (words).
_MAX_ROUND = 60
# A response of at least so many words repeats itself where more than this share of its triples of words is not new.
_MIN_DRONE = 40
_DRONE_SHARE = 0.5
# Fewest words of prose that cannot do without punctuation.
_MIN_PROSE = 20
# Fewest words of a last line that can break off.
_MIN_LAST = 3
# Words of a text of nothing but politeness.
_POLITE_LENGTH = range(4, 81)

_LABEL = re.compile(r"^\W*(instruction|question|task|prompt|user|q)\s*[:.)]\s*", re.IGNORECASE)
_COUNTER = re.compile(r"^[^\S\n]*\d+[.)]\s", re.MULTILINE)
# An instruction that is code is to be gone on with, and the answer may begin with it.
_CODE = re.compile(
    r"^\s*(from\s+\S+\s+import|import\s|def\s|class\s|#|//|/\*|```|<\w|@|\{)|\n[^\S\n]*(def|return|class)\s"
)
_ASKS_TO_REPEAT = re.compile(
    r"\b(repeat\w*|repetiti\w+|twice|chorus|refrain|chant\w*|lyrics|song|loop\w*|\d+ times|"
    r"(two|three|four|five|six|seven|eight|nine|ten|many|several) times)\b",
    re.IGNORECASE,
)
_ASKS_FOR_POLITENESS = re.compile(
    r"\b(thank\w*|greet\w*|polite\w*|courte\w*|repl(y|ies)|respond|e-?mails?|messages?|letters?|hello|hi|welcom\w*|"
    r"translat\w*|customers?|chat\w*|conversation|dialog\w*|say|says|rewrite|rephrase|paraphrase)\b",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"\b(thanks?|help\w*|assist\w*|happy|glad|welcome|pleasure|hesitate|feel free|let me know)\b", re.IGNORECASE
)
# What is left of politeness has other words, too.
_POLITE_WORDS = _words(
    """a about absolutely again all always am an and any anything appreciate are as ask asking assist assistance at be
    can certainly contact contacting could d dear delighted do don else feel for free further get give glad good
    great happy have having help helpful helping here hesitate hi hello hope how i if important in information
    interest interesting is it know let like ll looking love m matter may me more most much my need needs no of on
    or other our out pleasure please possible provide question questions re reaching ready really request s sharing
    so soon support sure t take thank thanks that the there this time to today topic truly very was way we welcome
    what whatever will wish with wonderful would you your answer answering best forward hear hearing thought
    thoughts love ve"""
)
# Words that most English sentences have one of, and words that no sentence ends with.
_ENGLISH = _words("the of and to a in is that it for are with as this you be or an on by")
_OPEN_WORDS = _words(
    """the a an and or of with from into your their its our my because than is are was were be by at who which if when
    while between through during very"""
)
_SENTENCE_END = re.compile(r"[^\W\d][.!?][\"'”’)\]*_`]*\s+[\"'“‘(\[*_]*[A-Z]")
_OPEN_MARK = re.compile(r"([,–—(\[]|\s-)$")
_OPEN_LETTER = re.compile(r"[^\W_]$")
_NOT_PROSE = re.compile(r"#\w|https?:|[{}=<>|]")
# A sentence that begins where none has ended.
_SENTENCE_START = re.compile(r"[a-z] (The|It|This|That|These|They|He|She|We|You|In|But|And|If|When|There) [a-z]")
_MARK = re.compile(r"[^\w\s]|\n")


def blind_spot(names: frozenset[str], instruction: str, input: str, response: str) -> str | None:
    """Returns the first of the named reasons that holds for a pair, or None."""
    pair = _Pair(instruction, input, response)
    return next((name for name, rule in RULES.items() if name in names and rule(pair)), None)


@dataclass(frozen=True)
class _Pair:
    instruction: str
    input: str
    response: str

    @property
    def task(self) -> str:
        return f"{self.instruction}\n{self.input}"

    @functools.cached_property
    def words(self) -> list[str]:
        """Words of the response, without the numbers of lists."""
        return tokenize(_COUNTER.sub("", self.response))


def _echoes(pair: _Pair) -> bool:
    copied, rest = _opening_echo(pair)
    return copied > 0 and rest <= (1 - _ECHO_SHARE) * (copied + rest)


def _begins_with_instruction(pair: _Pair) -> bool:
    return _opening_echo(pair)[0] > 0 and not _echoes(pair)


def _opening_echo(pair: _Pair) -> tuple[int, int]:
    """Returns how many words of the response are the instruction at its beginning, and how many follow."""
    if _CODE.search(pair.instruction):
        return 0, 0
    words = tokenize(_LABEL.sub("", pair.response))
    for text in (pair.task, pair.instruction):
        copy = tokenize(text)
        if len(copy) >= _MIN_ECHO and words[: len(copy)] == copy:
            return len(copy), len(words) - len(copy)
    return 0, 0


def _loops(pair: _Pair) -> bool:
    """The response goes round and round for a good part of its length, or says most things several times."""
    words = pair.words
    triples = list(zip(words, words[1:], words[2:]))
    repeated = len(triples) - len(set(triples))
    least = max(_MIN_LOOP, _LOOP_SHARE * len(words))
    # Only a round's own triples are new in a loop; to count them is much faster than to look for rounds.
    if repeated < least * (1 - 1 / _MIN_ROUNDS) - 2 or _ASKS_TO_REPEAT.search(pair.task):
        return False
    drones = len(words) >= _MIN_DRONE and repeated > _DRONE_SHARE * len(triples)
    return drones or _longest_loop(words) >= least


def _longest_loop(words: list[str]) -> int:
    """Returns how many words the longest loop of at least `_MIN_ROUNDS` rounds has; 0 if there is none."""
    longest = 0
    for period in range(1, min(_MAX_ROUND, len(words) // _MIN_ROUNDS) + 1):
        run = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= (_MIN_ROUNDS - 1) * period:
                longest = max(longest, run + period)
    return longest


def _is_only_polite(pair: _Pair) -> bool:
    if len(pair.words) not in _POLITE_LENGTH or not _POLITE.search(pair.response):
        return False
    return _POLITE_WORDS.issuperset(pair.words) and not _ASKS_FOR_POLITENESS.search(pair.task)


def _breaks_off(pair: _Pair) -> bool:
    """The response ends within an English sentence, by its last mark, its last word or the lack of both."""
    text = pair.response.strip()
    last = text.rsplit("\n", 1)[-1]
    words = tokenize(last)
    if len(words) < _MIN_LAST or _ENGLISH.isdisjoint(words) or _NOT_PROSE.search(last):
        return False
    if _OPEN_MARK.search(last):
        return True
    if not _OPEN_LETTER.search(last):
        return False
    return words[-1] in _OPEN_WORDS or bool(_SENTENCE_END.search(last))


def _lacks_punctuation(pair: _Pair) -> bool:
    """English prose, of some length or of several sentences, has no mark and no line break."""
    text = pair.response.strip()
    if _MARK.search(text):
        return False
    is_long = len(pair.words) >= _MIN_PROSE and sum(word in _ENGLISH for word in pair.words) >= len(pair.words) / 10
    return is_long or bool(_SENTENCE_START.search(text))


RULES: dict[str, Callable[[_Pair], bool]] = {
    ECHO: _echoes,
    HALF_ECHO: _begins_with_instruction,
    LOOP: _loops,
    POLITE: _is_only_polite,
    BREAKS_OFF: _breaks_off,
    NO_PUNCTUATION: _lacks_punctuation,
}
"""What holds for a pair, by reason."""
