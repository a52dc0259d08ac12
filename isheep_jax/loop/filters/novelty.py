"""Which instructions are new: ROUGE-L F1 against one pool of earlier instructions that lives as long as the run.

The search is exact, not approximate: the filters of `rouge` drop no pair above the limit, and what passes them is
decided by the longest common subsequence of its tokens (RapidFuzz, with a code point per token).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

from isheep_jax.loop.filters.normalization import is_symbol, tokenize, with_symbols
from isheep_jax.loop.filters.rouge import Bounds, Pairs, Segment, Texts, Vocabulary, all_pairs, batched

# Instructions compared with the pool at a time.
_BLOCK = 2048
# Words and symbols of a text in their order; None for a text without symbols.
Symbols = tuple[str, ...] | None
# Comparisons per call above which threads pay for themselves.
_MIN_THREADED = 20_000


def rouge_l(lcs: int, m: int, n: int) -> float:
    """ROUGE-L F1 of two token lists of lengths m and n, in the order of operations of the `rouge_score` package.

    The order decides ties: 7 common tokens of 7 and 13 give 0.7000000000000001, which is above a limit of 0.7.
    """
    return _f1(lcs / m, lcs / n) if lcs else 0.0


@dataclass(frozen=True)
class NearDuplicate:
    """The member of the pool that an instruction repeats.

    similarity: ROUGE-L F1 (0 to 1); 1 for equal texts.
    """

    id: str
    similarity: float


class Pool:
    """All instructions so far: seeds, then what every iteration accepted. Each takes about 1 kB."""

    def __init__(self, limit: float, segment: int = 16384):
        """Makes an empty pool.

        Args:
            limit: Highest ROUGE-L F1 (0 to 1) of a new instruction; with 1 only exact repetitions are dropped.
            segment: Number of instructions that are worth an index. No decision depends on it.
        """
        self.limit = limit
        self._ids: list[str] = []
        self._exact: dict[tuple[str, str], str] = {}
        self._waiting: list[str] = []
        self._vocabulary = Vocabulary()
        self._bounds = Bounds(limit)
        self._texts = Texts()
        self._symbols: list[Symbols] = []
        self._segments: list[Segment] = []
        self._segment = segment

    def add(self, id: str, instruction: str, input: str = "") -> None:
        """Adds an instruction, new or not."""
        self._exact.setdefault(_exact_key(instruction, input), id)
        self._ids.append(id)
        self._waiting.append(instruction)
        if len(self._waiting) == _BLOCK:
            self._index_waiting()

    def admit(
        self, ids: Sequence[str], instructions: Sequence[str], inputs: Sequence[str]
    ) -> list[NearDuplicate | None]:
        """Returns None for each new instruction, which then joins the pool, or what it repeats.

        The result is the same as for one call per instruction. ROUGE-L looks at the instruction alone, the exact
        comparison at instruction and input. An instruction that repeats several gets the most similar one, and the
        earliest of equally similar ones.
        """
        self._index_waiting()
        verdicts: list[NearDuplicate | None] = []
        for start in range(0, len(ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            verdicts += self._admit(ids[block], instructions[block], inputs[block])
        return verdicts

    def __len__(self) -> int:
        return len(self._ids)

    def _admit(
        self, ids: Sequence[str], instructions: Sequence[str], inputs: Sequence[str]
    ) -> list[NearDuplicate | None]:
        encoded = self._encode(instructions)
        symbols = [with_symbols(text) for text in instructions]
        verdicts = self._against_pool(encoded, symbols)
        within = self._within(encoded, symbols)
        accepted: list[int] = []
        is_accepted = [False] * len(ids)
        for i, id in enumerate(ids):
            near = [(similarity, -j) for j, similarity in within.get(i, ()) if is_accepted[j]]
            if near:
                similarity, j = max(near)
                if verdicts[i] is None or similarity > verdicts[i].similarity:
                    verdicts[i] = NearDuplicate(ids[-j], similarity)
            key = _exact_key(instructions[i], inputs[i])
            if verdicts[i] is None and key in self._exact:
                verdicts[i] = NearDuplicate(self._exact[key], 1.0)
            if verdicts[i] is None:
                accepted.append(i)
                is_accepted[i] = True
                self._exact[key] = id
        self._ids += [ids[i] for i in accepted]
        self._index(encoded.take(accepted), [symbols[i] for i in accepted])
        return verdicts

    def _encode(self, instructions: Sequence[str]) -> Texts:
        # With a limit of 1, only the exact comparison decides.
        return self._vocabulary.encode(tokenize(text) if self.limit < 1 else [] for text in instructions)

    def _index_waiting(self) -> None:
        if self._waiting:
            self._index(self._encode(self._waiting), [with_symbols(text) for text in self._waiting])
            self._waiting = []

    def _index(self, texts: Texts, symbols: Sequence[Symbols]) -> None:
        self._symbols += symbols
        self._texts.extend(texts.strings, texts.elements, texts.lengths)
        start, stop = self._indexed, len(self._texts)
        if stop - start < self._segment or self.limit >= 1:
            return
        # Segments of similar size merge: there are few, and a text is indexed again only log2 times.
        while self._segments and self._segments[-1].stop - self._segments[-1].start < 2 * (stop - start):
            start = self._segments.pop().start
        self._segments.append(Segment(self._texts, start, stop, self._bounds))

    @property
    def _indexed(self) -> int:
        return self._segments[-1].stop if self._segments else 0

    def _against_pool(self, encoded: Texts, symbols: Sequence[Symbols]) -> list[NearDuplicate | None]:
        best: dict[int, tuple[float, int]] = {}
        pairs = self._close(encoded, self._texts, self._candidates(encoded), (symbols, self._symbols))
        for i, j, similarity in pairs:
            order = np.lexsort((j, -similarity, i))
            first = order[np.unique(i[order], return_index=True)[1]]
            for q, k, value in zip(i[first].tolist(), j[first].tolist(), similarity[first].tolist()):
                best[q] = max(best.get(q, (0.0, 0)), (value, -k))
        return [NearDuplicate(self._ids[-best[i][1]], best[i][0]) if i in best else None for i in range(len(encoded))]

    def _candidates(self, encoded: Texts) -> Iterator[Pairs]:
        for segment in self._segments:
            yield from segment.candidates(encoded)
        recent = slice(self._indexed, None)
        lengths, narrow = self._texts.lengths[recent], self._texts.narrow[recent]
        for i, j in all_pairs(encoded, np.arange(len(encoded)), lengths, narrow, self._bounds):
            yield i, j + self._indexed

    def _within(self, encoded: Texts, symbols: Sequence[Symbols]) -> dict[int, list[tuple[int, float]]]:
        """The earlier instructions of a block that are too similar to each one: (index, similarity) by index."""
        pairs = all_pairs(encoded, np.arange(len(encoded)), encoded.lengths, encoded.narrow, self._bounds)
        within: dict[int, list[tuple[int, float]]] = {}
        earlier = ((i[j < i], j[j < i]) for i, j in pairs)
        for columns in self._close(encoded, encoded, earlier, (symbols, symbols)):
            for i, j, similarity in zip(*(column.tolist() for column in columns)):
                within.setdefault(i, []).append((j, similarity))
        return within

    def _close(
        self,
        queries: Texts,
        members: Texts,
        pairs: Iterable[Pairs],
        symbols: tuple[Sequence[Symbols], Sequence[Symbols]],
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the pairs whose ROUGE-L F1 is above the limit: indices of queries and members, and F1 [pairs].

        symbols: of the queries and of the members. ROUGE's words are blind to them, so that they count as words where
        two texts have the same words.
        """
        for i, j in batched(pairs):
            m, n = queries.lengths[i], members.lengths[j]
            need = self._bounds.need(m, n)
            # The bitmap filter once more, now with wide bitmaps and the need of exactly these two lengths.
            bits = np.bitwise_count(queries.wide[i] ^ members.wide[j]).sum(axis=1, dtype=np.int64)
            passed = np.flatnonzero(bits <= m + n - 2 * need)
            i, j, need = i[passed], j[passed], need[passed]
            a, b = [queries.strings[k] for k in i.tolist()], [members.strings[k] for k in j.tolist()]
            workers = -1 if len(i) > _MIN_THREADED else 1
            lcs = cpdist(a, b, scorer=LCSseq.similarity, dtype=np.int32, workers=workers)
            passed = np.flatnonzero(lcs >= need)
            i, j, lcs = i[passed], j[passed], lcs[passed]
            if self._vocabulary.ambiguous:
                tokens = self._vocabulary.tokens
                both = [(tokens(queries, q), tokens(members, k)) for q, k in zip(i.tolist(), j.tolist())]
                lcs = np.array([LCSseq.similarity(*pair) for pair in both], np.int32)
            close = np.flatnonzero(lcs > 0)
            i, j, lcs = i[close], j[close], lcs[close]
            similarity = _f1(lcs / queries.lengths[i], lcs / members.lengths[j])
            for k in np.flatnonzero(similarity == 1.0).tolist():
                a, b = symbols[0][i[k]], symbols[1][j[k]]
                if a != b:
                    similarity[k] = _with_symbols(a, b)
            close = similarity > self.limit
            yield i[close], j[close], similarity[close]


class RestartingPool:
    """A pool that starts again with the seeds alone each time a number of instructions has been kept.

    The authors' driver of the 72B models does so (I-SHEEP, `context_generate_single.py`), at every hundred or more.
    """

    def __init__(self, start: Callable[[], Pool], every: int):
        """Starts with the seeds.

        Args:
            start: Makes the pool of seeds.
            every: Number of kept instructions after which the pool starts again.
        """
        self._start, self._every = start, every
        self._pool, self._kept = start(), 0

    def add(self, id: str, instruction: str, input: str = "") -> None:
        """Adds a kept instruction."""
        self._pool.add(id, instruction, input)
        self._count(1)

    def admit(
        self, ids: Sequence[str], instructions: Sequence[str], inputs: Sequence[str]
    ) -> list[NearDuplicate | None]:
        """Does what `Pool.admit` does."""
        verdicts: list[NearDuplicate | None] = []
        while len(verdicts) < len(ids):
            # At most as many as can be kept before the pool starts again.
            block = slice(len(verdicts), len(verdicts) + self._every - self._kept)
            block_verdicts = self._pool.admit(ids[block], instructions[block], inputs[block])
            verdicts += block_verdicts
            self._count(block_verdicts.count(None))
        return verdicts

    def _count(self, kept: int) -> None:
        self._kept += kept
        if self._kept == self._every:
            self._pool, self._kept = self._start(), 0


def _with_symbols(a: Symbols, b: Symbols) -> float:
    """Returns the ROUGE-L F1 of two texts of the same words, with their symbols as words."""
    words = [part for part in a or b if not is_symbol(part)]
    a, b = a or words, b or words
    return rouge_l(LCSseq.similarity(a, b), len(a), len(b))


def _f1(precision, recall):
    """F1 in the order of operations of `rouge_score`, of numbers or arrays."""
    return 2 * precision * recall / (precision + recall)


def _exact_key(instruction: str, input: str) -> tuple[str, str]:
    return " ".join(instruction.split()), " ".join(input.split())
