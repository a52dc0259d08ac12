"""Which instructions are new: ROUGE-L F1 against one pool that lives as long as the run.

Exact, not approximate: the longest common subsequence comes from RapidFuzz, whose normalised Indel similarity
2 LCS / (m + n) is ROUGE-L F1 when every token is one code point. Pairs whose lengths alone rule out the limit are never
compared.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Indel, LCSseq
from rapidfuzz.process import cdist

_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Scripts that put no spaces between words: every character counts as a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
)
# Above this many comparisons in one call, threads pay for themselves.
_MANY = 10_000_000


def tokenize(text: str) -> list[str]:
    """Lower-case words of any script, without punctuation; single characters where a script has no spaces.

    On ASCII text these are the tokens of ROUGE's usual tokenizer (without stemming).
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    tokens: list[str] = []
    open_word = False
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)[0]
        if category == "M" and tokens:
            tokens[-1] += char
        elif _UNSPACED.match(char) and category in "LN":
            tokens.append(char)
            open_word = False
        elif category in "LN":
            if open_word:
                tokens[-1] += char
            else:
                tokens.append(char)
            open_word = True
        else:
            open_word = False
    return tokens


def normalise(text: str) -> str:
    """The text as its tokens, one space between them: what "the same instruction" means in decontamination."""
    return " ".join(tokenize(text))


def rouge_l(lcs: int, m: int, n: int) -> float:
    """ROUGE-L F1 of two token lists of lengths m and n, in the order of operations of the `rouge_score` package.

    The order decides ties: 7 common tokens of 7 and 13 give 0.7000000000000001, which is above a limit of 0.7.
    """
    if not lcs:
        return 0.0
    precision, recall = lcs / m, lcs / n
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class Neighbour:
    """The pool's most similar member that is too similar."""

    id: str
    similarity: float


class Pool:
    """All instructions so far: seeds, then what every iteration accepted."""

    def __init__(self, limit: float):
        """limit: highest ROUGE-L F1 (0 to 1) that is still new; with 1 only exact repetitions are not."""
        self.limit = limit
        self._ids: list[str] = []
        self._exact: dict[tuple[str, str], str] = {}
        self._codes: dict[str, str] = {}
        self._by_length: dict[int, tuple[list[str], list[int]]] = {}

    def add(self, id: str, instruction: str, input: str = "") -> None:
        self._insert(id, _exact_key(instruction, input), self._encode(instruction))

    def admit(self, ids: Sequence[str], instructions: Sequence[str], inputs: Sequence[str]) -> list[Neighbour | None]:
        """For each instruction in order: None when it is new (it then joins the pool), or what it repeats.

        The same as asking one after the other. ROUGE-L looks at the instruction alone; the exact comparison at
        instruction and input.
        """
        codes = [self._encode(text) for text in instructions]
        verdicts = self._against_pool(codes)
        within = self._within(codes)
        accepted: set[int] = set()
        for i, id in enumerate(ids):
            key = _exact_key(instructions[i], inputs[i])
            near = [(similarity, -j) for j, similarity in within.get(i, ()) if j in accepted]
            if near:
                similarity, j = max(near)
                if verdicts[i] is None or similarity > verdicts[i].similarity:
                    verdicts[i] = Neighbour(ids[-j], similarity)
            if verdicts[i] is None and key in self._exact:
                verdicts[i] = Neighbour(self._exact[key], 1.0)
            if verdicts[i] is None:
                accepted.add(i)
                self._insert(id, key, codes[i])
        return verdicts

    def __len__(self) -> int:
        return len(self._ids)

    def _insert(self, id: str, key: tuple[str, str], code: str) -> None:
        self._exact.setdefault(key, id)
        strings, indices = self._by_length.setdefault(len(code), ([], []))
        strings.append(code)
        indices.append(len(self._ids))
        self._ids.append(id)

    def _encode(self, text: str) -> str:
        """One code point per token, so that strings of code points have the similarity of token lists."""
        return "".join(self._codes.setdefault(t, _code_point(len(self._codes))) for t in tokenize(text))

    def _against_pool(self, codes: Sequence[str]) -> list[Neighbour | None]:
        found: list[Neighbour | None] = [None] * len(codes)
        if self.limit >= 1:
            return found
        for length in sorted({len(c) for c in codes if c}):
            queries = [i for i, c in enumerate(codes) if len(c) == length]
            strings: list[str] = []
            indices: list[int] = []
            for other, (s, i) in self._by_length.items():
                # LCS <= min(m, n): lengths too different can never reach the limit.
                if other and 2 * min(length, other) / (length + other) > self.limit - 1e-6:
                    strings += s
                    indices += i
            for q, matches in zip(queries, self._close([codes[q] for q in queries], strings)):
                best = max(((similarity, -indices[j]) for j, similarity in matches), default=None)
                if best:
                    found[q] = Neighbour(self._ids[-best[1]], best[0])
        return found

    def _within(self, codes: Sequence[str]) -> dict[int, list[tuple[int, float]]]:
        """For each instruction of a block, the earlier ones of the block that are too similar."""
        if self.limit >= 1:
            return {}
        return {
            i: [(j, s) for j, s in matches if j < i] for i, matches in enumerate(self._close(codes, codes)) if matches
        }

    def _close(self, queries: Sequence[str], others: Sequence[str]) -> list[list[tuple[int, float]]]:
        """For each query the others whose ROUGE-L F1 is above the limit, with it."""
        if not queries or not others:
            return [[] for _ in queries]
        # The matrix is float32: take a little more than needed, then decide in float64.
        cutoff = max(self.limit - 1e-4, 1e-9)
        workers = -1 if len(queries) * len(others) > _MANY else 1
        matrix = cdist(queries, others, scorer=Indel.normalized_similarity, score_cutoff=cutoff, workers=workers)
        close: list[list[tuple[int, float]]] = [[] for _ in queries]
        for i, j in np.argwhere(matrix > 0).tolist():
            a, b = queries[i], others[j]
            if a and b:
                similarity = rouge_l(LCSseq.similarity(a, b), len(a), len(b))
                if similarity > self.limit:
                    close[i].append((j, similarity))
        return close


def _exact_key(instruction: str, input: str) -> tuple[str, str]:
    return " ".join(instruction.split()), " ".join(input.split())


def _code_point(index: int) -> str:
    # Surrogates are not characters of their own: leave them out.
    return chr(index + 1 if index + 1 < 0xD800 else index + 1 + 0x800)
