"""Near-linear search for pairs of texts that may be similar: no pair whose ROUGE-L F1 is above the limit is missed.

F1 is 2 LCS / (m + n) for two texts of m and n tokens, and their longest common subsequence (LCS) is no longer than the
number of tokens they share, counted with repetition. Two texts above the limit h therefore share at least
`need` = floor(h (m + n) / 2) + 1 tokens. This gives three filters, applied in this order:

1. Length: `need` is at most min(m, n).
2. Prefix (AllPairs: Bayardo, Ma and Srikant, 2007; PPJoin: Xiao et al., 2008): with the tokens of both texts in one
   fixed order, the first shared token is among the first m - need + 1 of one text and n - need + 1 of the other. The
   order is rarest first, so that few texts share a token there.
3. Bitmap (Sandes, Teodoro and Melo, 2020): each token flips one bit of its text's bitmap. Two bitmaps differ in at most
   as many bits as the texts differ in tokens, which is at most m + n - 2 need.

Each repetition of a token within a text counts as a separate *element*, so that texts are sets of elements. If the
prefix filter would find many texts, because all share their words, the bitmaps of all texts of a suitable length are
compared instead: that costs a nanosecond or two per text, which bounds the time on any data.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Indices of queries and of members, int64 [pairs] each.
Pairs = tuple[np.ndarray, np.ndarray]

# Bitmaps compared at a time: few enough for the processor's cache.
_CACHED = 1 << 15
# Candidate pairs that are passed on together.
_BATCH = 1 << 17
# Cost per text of following the lists of the prefix filter, relative to comparing all bitmaps.
_LIST_COST = 6
# 64-bit words of a wide bitmap.
_WORDS = 4
# Number of code points that can represent a token: all but 0 and the surrogates.
_CODE_POINTS = 0x110000 - 0x800 - 1
# Subtracted from the limit in all filters, so that rounding drops no tie; the exact formula decides ties.
_MARGIN = 1e-9
_FAR = np.iinfo(np.int32).max


class Column:
    """An array that grows at the end, in amortized constant time per value."""

    def __init__(self, dtype: type, width: tuple[int, ...] = ()):
        self._data = np.zeros((0, *width), dtype)
        self._size = 0

    @property
    def values(self) -> np.ndarray:
        return self._data[: self._size]

    def extend(self, values: np.ndarray) -> None:
        size = self._size + len(values)
        if size > len(self._data):
            grown = np.zeros((max(size, len(self._data) * 3 // 2), *self._data.shape[1:]), self._data.dtype)
            grown[: self._size] = self.values
            self._data = grown
        self._data[self._size : size] = values
        self._size = size


class Texts:
    """Encoded texts, stored as columns.

    strings: each text as a string with a code point per token. elements: the elements of all texts, in the order of
    their tokens. starts, lengths: the range of each text in `elements`. wide: bitmaps [N, _WORDS] of 64 * _WORDS bits.
    narrow: bitmaps [N] of 64 bits, the XOR of the wide ones' words.
    """

    def __init__(self):
        self.strings: list[str] = []
        self._columns = {
            "elements": Column(np.int32),
            "starts": Column(np.int64),
            "lengths": Column(np.int32),
            "wide": Column(np.uint64, (_WORDS,)),
            "narrow": Column(np.uint64),
        }

    elements = property(lambda self: self._columns["elements"].values)
    starts = property(lambda self: self._columns["starts"].values)
    lengths = property(lambda self: self._columns["lengths"].values)
    wide = property(lambda self: self._columns["wide"].values)
    narrow = property(lambda self: self._columns["narrow"].values)

    def __len__(self) -> int:
        return len(self.strings)

    def extend(self, strings: Sequence[str], elements: np.ndarray, lengths: np.ndarray) -> None:
        starts = len(self.elements) + np.cumsum(lengths) - lengths
        # Fibonacci hashing gives neighbors in the vocabulary different bits.
        bit = (elements.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)
        word = np.repeat(np.arange(len(lengths)) * _WORDS, lengths) + (bit // 64).astype(np.int64)
        wide = np.zeros(len(lengths) * _WORDS, np.uint64)
        np.bitwise_xor.at(wide, word, np.uint64(1) << bit % np.uint64(64))
        wide = wide.reshape(-1, _WORDS)
        self.strings += strings
        columns = elements, starts, lengths, wide, np.bitwise_xor.reduce(wide, axis=1)
        for column, values in zip(self._columns.values(), columns):
            column.extend(values)

    def take(self, chosen: Sequence[int]) -> "Texts":
        """Returns the chosen texts, in the given order."""
        taken = Texts()
        index = np.array(chosen, np.int64)
        taken.extend(
            [self.strings[i] for i in chosen],
            self.elements[ranges(self.starts[index], self.lengths[index])],
            self.lengths[index],
        )
        return taken


class Vocabulary:
    """Numbers for elements in the order of their first appearance; a repeated token is another element."""

    def __init__(self):
        self._elements: dict[str | tuple[str, int], int] = {}
        self._first = Column(np.int32)

    @property
    def ambiguous(self) -> bool:
        """True where there are more elements than code points, so that a code point may represent several tokens."""
        return len(self._elements) > _CODE_POINTS

    def encode(self, texts: Iterable[Sequence[str]]) -> Texts:
        """Encodes texts, given as lists of tokens, and adds their new elements to the vocabulary."""
        known = self._elements
        elements: list[int] = []
        lengths: list[int] = []
        new: list[int] = []
        for tokens in texts:
            keys: list[str | tuple[str, int]] = list(tokens)
            if len(set(tokens)) < len(tokens):
                seen: Counter[str] = Counter()
                keys = []
                for token in tokens:
                    seen[token] += 1
                    keys.append((token, seen[token]) if seen[token] > 1 else token)
            for key in keys:
                element = known.get(key)
                if element is None:
                    element = known[key] = len(known)
                    new.append(known[key[0]] if isinstance(key, tuple) else element)
                elements.append(element)
            lengths.append(len(tokens))
        self._first.extend(np.array(new, np.int32))
        flat = np.array(elements, np.int32)
        code = self._first.values[flat] % _CODE_POINTS + 1
        code += 0x800 * (code >= 0xD800)
        text = code.astype("<u4").tobytes().decode("utf-32-le")
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        encoded = Texts()
        strings = [text[end - length : end] for end, length in zip(ends, lengths)]
        encoded.extend(strings, flat, np.array(lengths, np.int64))
        return encoded

    def tokens(self, texts: Texts, index: int) -> list[int]:
        """Returns a number for each token of a text, the same for its repetitions."""
        start = texts.starts[index]
        return self._first.values[texts.elements[start : start + texts.lengths[index]]].tolist()


class Bounds:
    """The conditions that two texts of m and n tokens must satisfy to be above the limit."""

    def __init__(self, limit: float):
        self._half = (limit - _MARGIN) / 2

    def need(self, m: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Least number of shared tokens, and so the least length of the LCS."""
        return np.maximum(np.floor(self._half * (m + n)).astype(np.int64) + 1, 1)

    def differences(self, m: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Upper bound (exclusive) on the bits in which the narrow bitmaps differ; 0 if the lengths exclude the pair."""
        need = self.need(m, n)
        return np.where(need > np.minimum(m, n), 0, np.minimum(m + n - 2 * need + 1, 65)).astype(np.uint8)

    def most_differences(self, m: np.ndarray, longest: np.ndarray) -> np.ndarray:
        """Upper bound on `differences` over all partners of at most `longest` tokens.

        `differences` is not monotonic in the length, since `need` is rounded; this bound does not round it.
        """
        return np.minimum(np.floor((m + longest) * (1 - 2 * self._half)) + 1, 65).astype(np.uint8)

    def shortest(self, m: np.ndarray) -> np.ndarray:
        """Length of the shortest possible partner of a text of m tokens, or one less."""
        return np.maximum(np.floor(max(self._half, 0) * m / (1 - self._half) - 1e-6).astype(np.int64), 1)

    def longest(self, m: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Length of the longest possible partner, or one more, if the first shared element is at `position`."""
        if self._half <= 0:
            return np.full(np.shape(m), _FAR, np.int64)
        return np.minimum(np.floor((m - position) / self._half - m + 1e-6), _FAR).astype(np.int64)


def all_pairs(
    queries: Texts, chosen: np.ndarray, lengths: np.ndarray, narrow: np.ndarray, bounds: Bounds
) -> Iterator[Pairs]:
    """Yields the pairs of a chosen query and a member that pass the length and bitmap filters, without an index.

    Args:
        queries: Encoded texts.
        chosen: Indices of the queries to compare.
        lengths: Number of tokens of each member [N]. If members are sorted by length, this is faster.
        narrow: Bitmap of each member [N].
        bounds: Bounds of the limit.
    """
    is_sorted = bool(np.all(lengths[1:] >= lengths[:-1]))
    chosen_lengths = queries.lengths[chosen]
    for m in np.unique(chosen_lengths[chosen_lengths > 0]):
        group = chosen[chosen_lengths == m]
        low, high = 0, len(lengths)
        if is_sorted:
            low, high = np.searchsorted(lengths, [bounds.shortest(m), bounds.longest(m, np.int64(0)) + 1]).tolist()
        for start in range(low, high, _CACHED):
            block = narrow[start : min(start + _CACHED, high)]
            below = bounds.differences(m, lengths[start : start + len(block)])
            step = max(1, _CACHED // len(block))
            for first in range(0, len(group), step):
                rows = group[first : first + step]
                near = np.flatnonzero(np.bitwise_count(queries.narrow[rows, None] ^ block) < below)
                if len(near):
                    row, column = np.divmod(near, len(block))
                    yield rows[row], column + start


class Segment:
    """An immutable index for the prefix filter over the members `start` to `stop` of a pool.

    Members are sorted by length, and the list of each element by member, so that the members of a list with lengths in
    a given range are contiguous.
    """

    def __init__(self, texts: Texts, start: int, stop: int, bounds: Bounds):
        self.start, self.stop = start, stop
        self._bounds = bounds
        lengths = texts.lengths[start:stop]
        order = np.argsort(lengths, kind="stable")
        self._members = order + start
        self._lengths = lengths[order]
        self._narrow = texts.narrow[self._members]

        elements = texts.elements[texts.starts[start] : texts.starts[stop - 1] + lengths[-1]]
        counts = np.bincount(elements, minlength=1)
        self._rank = np.empty(len(counts), np.int64)
        self._rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))

        row = np.empty(len(order), np.int64)
        row[order] = np.arange(len(order))
        row, rank, position = _sorted_elements(np.repeat(row, lengths), self._rank[elements], len(counts))
        n = self._lengths[row].astype(np.int64)
        in_prefix = bounds.longest(n, position) >= bounds.shortest(n)
        self._lists = np.sort(rank[in_prefix] * len(order) + row[in_prefix])
        self._list_narrow = self._narrow[self._lists % len(order)]

    def candidates(self, queries: Texts) -> Iterator[Pairs]:
        """Yields pairs of a query and a member (index in the pool): all above the limit, and others.

        A pair may come twice.
        """
        size, bounds = len(self._members), self._bounds
        elements = queries.elements
        known = elements < len(self._rank)
        rank = np.where(known, self._rank[np.where(known, elements, 0)], -1)
        row = np.repeat(np.arange(len(queries)), queries.lengths)
        row, rank, position = _sorted_elements(row, rank, len(self._rank))
        m = queries.lengths[row].astype(np.int64)
        longest = bounds.longest(m, position)
        in_prefix = (rank >= 0) & (longest >= bounds.shortest(m))
        row, rank, m, longest = row[in_prefix], rank[in_prefix], m[in_prefix], longest[in_prefix]
        low = np.searchsorted(self._lengths, bounds.shortest(m))
        high = np.searchsorted(self._lengths, longest, side="right")
        begin = np.searchsorted(self._lists, rank * size + low)
        counts = np.searchsorted(self._lists, rank * size + high) - begin

        in_lists = np.bincount(row, counts, len(queries))
        fitting = np.zeros(len(queries), np.int64)
        np.maximum.at(fitting, row, high - low)
        scanned = in_lists * _LIST_COST > fitting
        for q, member in all_pairs(queries, np.flatnonzero(scanned), self._lengths, self._narrow, bounds):
            yield q, self._members[member]

        listed = np.flatnonzero((counts > 0) & ~scanned[row])
        row, begin, counts = row[listed], begin[listed], counts[listed]
        below = bounds.most_differences(m[listed], np.minimum(longest[listed], self._lengths[-1]))
        pieces = np.searchsorted(np.cumsum(counts), np.arange(_CACHED, counts.sum() + _CACHED, _CACHED))
        first = 0
        for last in (pieces + 1).tolist():
            part = slice(first, last)
            index = ranges(begin[part], counts[part])
            q = np.repeat(row[part], counts[part])
            bits = np.bitwise_count(self._list_narrow[index] ^ queries.narrow[q])
            near = np.flatnonzero(bits < np.repeat(below[part], counts[part]))
            if len(near):
                yield q[near], self._members[self._lists[index[near]] % size]
            first = last


def batched(pairs: Iterable[Pairs]) -> Iterator[Pairs]:
    """Yields the same pairs in fewer, longer arrays."""
    waiting: list[Pairs] = []
    size = 0
    for pair in pairs:
        waiting.append(pair)
        size += len(pair[0])
        if size > _BATCH:
            yield tuple(np.concatenate(column) for column in zip(*waiting))
            waiting, size = [], 0
    if waiting:
        yield tuple(np.concatenate(column) for column in zip(*waiting))


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenates the ranges [start, start + count)."""
    counts = counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _sorted_elements(row: np.ndarray, rank: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts elements by text and rank; returns text, rank (-1 to ranks - 1) and position within the text of each."""
    key = np.sort(row * (ranks + 1) + rank + 1)
    row, rank = np.divmod(key, ranks + 1)
    return row, rank - 1, np.arange(len(row)) - np.searchsorted(row, row)
