import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from isheep_jax.loop.filters import rouge
from isheep_jax.loop.filters.rouge import Bounds, Segment, Texts, Vocabulary, all_pairs, batched

LIMITS = ["0", "0.1", "0.3", "0.5", "2/3", "0.7", "0.9", "0.99"]


def made(count, letters, longest, seed):
    rng = random.Random(f"overlap {letters} {longest} {seed}")
    return [[f"t{rng.randrange(letters)}" for _ in range(rng.randint(0, longest))] for _ in range(count)]


def sharing(queries, members, limit):
    """Pairs that share more than limit / 2 of all their tokens, with repetition: by the definition, in fractions."""
    bags = [Counter(tokens) for tokens in members]
    return {
        (i, j)
        for i, tokens in enumerate(queries)
        for j, bag in enumerate(bags)
        if (common := (Counter(tokens) & bag).total())
        and common * 2 >= (limit - Fraction(1, 10**9)) * (len(tokens) + bag.total())
    }


def pairs_of(found):
    return {pair for i, j in found for pair in zip(i.tolist(), j.tolist())}


def both(letters, longest, seed):
    queries, members = made(40, letters, longest, f"{seed}q"), made(90, letters, longest, f"{seed}m")
    vocabulary, texts = Vocabulary(), Texts()
    for part in (members[:30], members[30:]):
        encoded = vocabulary.encode(part)
        texts.extend(encoded.strings, encoded.elements, encoded.lengths)
    return queries, members, vocabulary.encode(queries), texts


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("letters", "longest"), [(3, 8), (12, 12), (60, 12), (400, 12), (30, 150)])
@pytest.mark.parametrize("list_cost", [0, 1e9])
def test_no_pair_that_shares_enough_is_dropped(monkeypatch, limit, letters, longest, list_cost):
    monkeypatch.setattr(rouge, "_LIST_COST", list_cost)
    monkeypatch.setattr(rouge, "_CACHED", 64)
    limit = Fraction(limit)
    bounds = Bounds(float(limit))
    for seed in range(2):
        queries, members, encoded, texts = both(letters, longest, seed)
        wanted = sharing(queries, members, limit)
        everything = all_pairs(encoded, np.arange(len(encoded)), texts.lengths, texts.narrow, bounds)
        assert wanted <= pairs_of(everything)
        for start, stop in ((0, 90), (0, 30), (30, 90)):
            segment = Segment(texts, start, stop, bounds)
            found = pairs_of(segment.candidates(encoded))
            assert {pair for pair in wanted if start <= pair[1] < stop} <= found
            assert all(start <= j < stop for _, j in found)


def test_the_filters_stop_most_pairs():
    queries, members, encoded, texts = both(400, 12, 0)
    found = pairs_of(Segment(texts, 0, 90, Bounds(0.7)).candidates(encoded))
    assert len(found) < len(queries) * len(members) / 20


@pytest.mark.parametrize("limit", LIMITS)
def test_bounds_hold_for_all_lengths(limit):
    exact, bounds = Fraction(limit), Bounds(float(Fraction(limit)))
    for m in range(1, 40):
        partners = [n for n in range(1, 2000) if min(m, n) * 2 >= exact * (m + n)]
        n = np.array(partners)
        need = bounds.need(np.int64(m), n)
        assert need.tolist() == [max(1, -(-exact * (m + k) // 2)) for k in partners]
        assert bounds.shortest(np.int64(m)) <= partners[0]
        for position in range(m):
            within = n[need <= m - position]
            if len(within):
                longest = bounds.longest(np.int64(m), np.int64(position))
                assert longest >= within[-1]
                most = bounds.most_differences(np.int64(m), longest)
                assert most >= min(65, (m + within - 2 * bounds.need(np.int64(m), within)).max() + 1)


def test_repetitions_are_elements_of_their_own():
    vocabulary = Vocabulary()
    encoded = vocabulary.encode([["a", "b", "a", "a"], ["b", "a", "a"], []])
    first, second = encoded.elements[:4].tolist(), encoded.elements[4:].tolist()
    assert len(set(first)) == 4
    assert set(second) < set(first)
    assert encoded.strings == [first_ := encoded.strings[0], first_[1] + first_[0] * 2, ""]
    assert vocabulary.tokens(encoded, 0) == [first[0], first[1], first[0], first[0]]


def test_texts_without_tokens_are_no_partners():
    vocabulary, texts, bounds = Vocabulary(), Texts(), Bounds(0.0)
    empty = vocabulary.encode([[], []])
    texts.extend(empty.strings, empty.elements, empty.lengths)
    segment = Segment(texts, 0, 2, bounds)
    assert pairs_of(segment.candidates(vocabulary.encode([["a"], []]))) == set()


def test_batches_hold_the_same_pairs(monkeypatch):
    monkeypatch.setattr(rouge, "_BATCH", 10)
    parts = [(np.arange(k), np.arange(k) + 1) for k in (4, 9, 1, 0, 3)]
    batches = list(batched(parts))
    assert [len(i) for i, _ in batches] == [13, 4]
    assert np.concatenate([i for i, _ in batches]).tolist() == [x for i, _ in parts for x in i.tolist()]
