import random

import pytest

from isheep_jax.config import Config, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.records import KEPT, Pair, Score, Scores, dropped, kept
from isheep_jax.loop.select import select, sentences


def make(scores, samples=1, text=lambda i: "Do it."):
    """Pairs and scores from a list of (quality, following); None for a pair that got none."""
    pairs, assessed = [], []
    for n, values in enumerate(scores):
        i, sample = divmod(n, samples)
        id = f"1-{i:06d}"
        pairs.append(Pair(f"{id}-{sample}", id, text(i), "", f"answer {n}", KEPT))
        missing = values is None
        quality, following = values or (None, None)
        verdict = dropped("unscored") if missing else KEPT
        assessed.append(Scores(pairs[-1].id, Score(quality), Score(following), verdict))
    return pairs, assessed


def chosen(settings, scores, seed=0, samples=1, **more):
    records = select(Config(select=settings, seed=seed), 1, *make(scores, samples, **more))
    return [r.id for r in kept(records)], {r.id: r.verdict.reason for r in records}


def some_scores(n, seed=1):
    rng = random.Random(seed)
    return [(rng.uniform(1, 10), rng.uniform(1, 10)) for _ in range(n)]


def test_the_threshold_is_strict_and_on_each_score():
    ids, reasons = chosen(SelectConfig(), [(8, 9), (9, 8), (8.01, 8.01), (10, 7), (9, 9)])
    assert ids == ["1-000002-0", "1-000004-0"]
    assert reasons["1-000000-0"] == "not above the threshold"


def test_of_several_samples_the_best_by_the_sum_stands_for_its_instruction():
    ids, reasons = chosen(SelectConfig(), [(9, 9), (9.5, 9.5), (8.5, 8.5), (9, 9), (9, 9), (8.5, 8.5)], samples=3)
    assert ids == ["1-000000-1", "1-000001-0"]
    assert reasons["1-000000-0"] == "another sample is better"


def test_following_above_its_ceiling_does_not_count_more():
    scores = [(5, 10), (6, 8)]
    assert chosen(SelectConfig(threshold=1), scores, samples=2)[0] == ["1-000000-0"]
    assert chosen(SelectConfig(threshold=1, following_ceiling=8), scores, samples=2)[0] == ["1-000000-1"]
    # The ceiling is for the order only: the threshold sees the score itself.
    assert chosen(SelectConfig(threshold=8, following_ceiling=7.5), [(9, 9)])[0] == ["1-000000-0"]


@pytest.mark.parametrize("n", [10, 33, 100])
def test_the_top_fraction_is_the_best_and_as_many_as_it_says(n):
    scores = some_scores(n)
    ids, _ = chosen(SelectConfig(rule="top_fraction", fraction=0.3), scores)
    assert len(ids) == int(0.3 * n + 0.5)
    sums = {f"1-{i:06d}-0": sum(s) for i, s in enumerate(scores)}
    assert min(sums[i] for i in ids) >= max(v for k, v in sums.items() if k not in ids)
    assert ids == sorted(ids)


def text_of(i):
    return "One. " * (1 + i % 6)


def test_buckets_keep_the_same_share_of_every_length():
    settings = SelectConfig(rule="top_fraction", fraction=0.5, buckets="sentences")
    # The longer the instruction the worse the score: without buckets only short ones would stay.
    ids, _ = chosen(settings, [(9 - i % 6, 9.0) for i in range(60)], text=text_of)
    lengths = [min(4, 1 + int(id[2:8]) % 6) for id in ids]
    assert [lengths.count(n) for n in (1, 2, 3, 4)] == [5, 5, 5, 15]


def test_a_kind_of_task_that_scores_low_in_general_keeps_its_share_by_its_opening_word():
    words = ["Add", "add", "Count", "Swap"]
    # Add is scored low whatever the answer: by sentences alone it would lose every place.
    scores = [(2.0 if i % 4 < 2 else 9.0, 9.0 - i / 100) for i in range(40)]
    settings = {"rule": "top_fraction", "fraction": 0.3}
    openings = {}
    for buckets in ("sentences", "opening"):
        chosen_by = SelectConfig(buckets=buckets, **settings)
        ids, _ = chosen(chosen_by, scores, text=lambda i: f"{words[i % 4]} this. Do it.")
        openings[buckets] = [words[int(id[2:8]) % 4].lower() for id in ids]
    assert set(openings["sentences"]) == {"count", "swap"}
    assert [openings["opening"].count(word) for word in ("add", "count", "swap")] == [6, 3, 3]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_small_buckets_keep_the_fraction_in_total(fraction):
    # Every instruction but the first hundred begins with a word of its own: each bucket alone would round to none.
    settings = SelectConfig(rule="top_fraction", fraction=fraction, buckets="opening")
    words = ["Common"] * 100 + [f"word{i}" for i in range(100)]
    ids, _ = chosen(settings, some_scores(200), text=lambda i: f"{words[i]} task.")
    assert len(ids) == round(200 * fraction)
    assert sum(int(id[2:8]) < 100 for id in ids) == round(100 * fraction)


@pytest.mark.parametrize("buckets", ["none", "sentences", "opening"])
def test_random_keeps_as_many_per_bucket_as_the_top_fraction_and_never_looks_at_scores(buckets):
    top = SelectConfig(rule="top_fraction", fraction=0.3, buckets=buckets)
    blind = SelectConfig(rule="random", fraction=0.3, buckets=buckets, at_most=15)
    best, _ = chosen(SelectConfig(**{**vars(top), "at_most": 15}), some_scores(200), samples=2, text=text_of)
    drawn, _ = chosen(blind, some_scores(200), samples=2, text=text_of)
    again, _ = chosen(blind, some_scores(200, seed=2), samples=2, text=text_of)
    other, _ = chosen(blind, some_scores(200), seed=1, samples=2, text=text_of)
    assert len(drawn) == len(best) == 15
    assert drawn == again != other
    assert {id[-1] for id in drawn} == {"0", "1"}


def test_none_keeps_the_first_sample_of_everything_that_passed_the_rules():
    scores = [(1.0, 1.0), (9.0, 9.0), None, (5.0, 5.0)]
    assert chosen(SelectConfig(rule="none"), scores, samples=2)[0] == ["1-000000-0", "1-000001-0"]
    assert chosen(SelectConfig(rule="none", at_most=1), scores, samples=2)[0] == ["1-000000-0"]


def test_at_most_keeps_the_best_or_the_first():
    scores = [(8.5, 8.5), (10, 10), (9, 9), (9.5, 9.5)]
    best, reasons = chosen(SelectConfig(at_most=2), scores)
    assert best == ["1-000001-0", "1-000003-0"]
    assert reasons["1-000000-0"] == "more than select.at_most"
    assert chosen(SelectConfig(at_most=2, at_most_order="first"), scores)[0] == ["1-000000-0", "1-000001-0"]


def test_what_was_dropped_before_keeps_its_reason():
    pairs, scores = make([(9, 9), (9, 9), None])
    pairs[0] = Pair(**{**vars(pairs[0]), "verdict": dropped("asks back")})
    records = select(Config(), 1, pairs, scores[1:])
    assert [r.verdict.reason for r in records] == ["asks back", "", "unscored"]
    assert [r.id for r in records] == [p.id for p in pairs]


def test_the_chance_of_passing_when_sampled_is_noted():
    pairs, _ = make([(9, 9)])
    half = Score(8.5, 9, 1.0, (0, 0, 0, 0, 0, 0, 0, 0.5, 0.5, 0))
    (record,) = select(Config(), 1, pairs, [Scores(pairs[0].id, half, half, KEPT)])
    assert record.above == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        (SelectConfig(threshold=9.5), r"lower select.threshold \(now 9.5\)"),
        (SelectConfig(rule="top_fraction", fraction=0.5, at_least=9), r"raise select.fraction \(now 0.5\)"),
        (SelectConfig(rule="none", at_least=9), "lower select.at_least"),
    ],
)
def test_too_few_say_what_was_scored_how_and_what_to_change(settings, hint):
    with pytest.raises(UserError, match=hint) as e:
        chosen(settings, [(4, 6), (8, 7)])
    assert "of 2 scored pairs quality: mean 6.00, highest 8.00, following: mean 6.50, highest 7.00" in str(e.value)


def test_nothing_scored_points_to_the_records():
    with pytest.raises(UserError, match="none of 1 pairs has scores"):
        chosen(SelectConfig(), [None])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Do it", 1),
        ("Do it. Now!", 2),
        ("It is 3.5 metres. Why?", 2),
        ('He said "go." Then he left.', 2),
        ("Wait... what?", 2),
        ("写诗。写歌！", 2),
        ("One line\nanother line", 2),
        ("...", 1),
        ("", 1),
    ],
)
def test_sentences_are_counted_by_the_texts_own_punctuation(text, count):
    assert sentences(text) == count


def test_no_pair_at_all_is_too_few_whatever_the_setting():
    with pytest.raises(UserError, match="0 pairs are kept"):
        chosen(SelectConfig(at_least=0), [(4, 6)])
