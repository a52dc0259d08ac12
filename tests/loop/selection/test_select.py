import dataclasses
import math
import random

import pytest

from isheep_jax.config import AssessConfig, Config, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.records import KEPT, Pair, ReadingValue, Score, Scores, dropped, kept
from isheep_jax.loop.selection.ranking import perplexity
from isheep_jax.loop.selection.select import select, sentences


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
    blind = SelectConfig(rule="random", fraction=0.3, buckets=buckets, max_pairs=15)
    best, _ = chosen(SelectConfig(**{**vars(top), "max_pairs": 15}), some_scores(200), samples=2, text=text_of)
    drawn, _ = chosen(blind, some_scores(200), samples=2, text=text_of)
    again, _ = chosen(blind, some_scores(200, seed=2), samples=2, text=text_of)
    other, _ = chosen(blind, some_scores(200), seed=1, samples=2, text=text_of)
    assert len(drawn) == len(best) == 15
    assert drawn == again != other
    assert {id[-1] for id in drawn} == {"0", "1"}


def test_none_keeps_the_first_sample_of_everything_that_passed_the_rules():
    scores = [(1.0, 1.0), (9.0, 9.0), None, (5.0, 5.0)]
    assert chosen(SelectConfig(rule="none"), scores, samples=2)[0] == ["1-000000-0", "1-000001-0"]
    assert chosen(SelectConfig(rule="none", max_pairs=1), scores, samples=2)[0] == ["1-000000-0"]


def test_max_pairs_keeps_the_best_or_the_first():
    scores = [(8.5, 8.5), (10, 10), (9, 9), (9.5, 9.5)]
    best, reasons = chosen(SelectConfig(max_pairs=2), scores)
    assert best == ["1-000001-0", "1-000003-0"]
    assert reasons["1-000000-0"] == "more than select.max_pairs"
    assert chosen(SelectConfig(max_pairs=2, max_pairs_order="first"), scores)[0] == ["1-000000-0", "1-000001-0"]


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
        (SelectConfig(rule="top_fraction", fraction=0.5, min_pairs=9), r"raise select.fraction \(now 0.5\)"),
        (SelectConfig(rule="none", min_pairs=9), "lower select.min_pairs"),
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
        chosen(SelectConfig(min_pairs=0), [(4, 6)])


def decided(settings, pairs, scores, level="both", prompt="standard", readings=("rubric",), clusters=None):
    config = Config(select=settings, assess=AssessConfig(readings=readings, level=level, prompt=prompt))
    records = select(config, 1, pairs, scores, clusters)
    return [r.id for r in kept(records)], {r.id: r.verdict.reason for r in records}


def read(**values):
    """Pairs with readings, each a list over the pairs of values per token (of ten) or None."""
    count = len(next(iter(values.values())))
    pairs, _ = make([(1, 1)] * count)
    scores = []
    for n, pair in enumerate(pairs):
        readings = {name: ReadingValue(each[n] and 10 * each[n], 10) for name, each in values.items()}
        missing = [name for name, reading in readings.items() if reading.value is None]
        scores.append(Scores(pair.id, None, None, dropped("unscored") if missing else KEPT, readings))
    return pairs, scores


def likely_by(perplexities):
    """Pairs of these perplexities; None where there is none."""
    return read(likelihood=[x and -math.log(x) for x in perplexities])


def one_score(values, field="quality"):
    pairs, _ = make([(1, 1)] * len(values))
    scores = [Scores(p.id, *(Score(v) if name == field else None for name in ("quality", "following")), KEPT)
              for p, v in zip(pairs, values, strict=True)]  # fmt: skip
    return pairs, scores


@pytest.mark.parametrize("level", ["quality", "following"])
def test_with_one_score_that_one_alone_decides(level):
    assert decided(SelectConfig(), *one_score([8, 8.01, 9], level), level)[0] == ["1-000001-0", "1-000002-0"]
    top = SelectConfig(rule="top_fraction", fraction=0.34)
    assert decided(top, *one_score([8, 8.01, 9], level), level)[0] == ["1-000002-0"]


@pytest.mark.parametrize("rule", ["threshold", "top_fraction", "random_threshold"])
def test_without_scores_rules_that_need_them_keep_all_that_passed_the_text_rules(rule):
    pairs, _ = make([(1, 1)] * 3)
    pairs[1] = dataclasses.replace(pairs[1], verdict=dropped("asks back"))
    ids, reasons = decided(SelectConfig(rule=rule), pairs, [], readings=())
    assert ids == ["1-000000-0", "1-000002-0"]
    assert reasons["1-000001-0"] == "asks back"


def test_without_scores_random_still_keeps_its_fraction():
    pairs, _ = make([(1, 1)] * 10)
    assert len(decided(SelectConfig(rule="random", fraction=0.3), pairs, [], readings=())[0]) == 3


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(1.0, ["1-000000-0"]), (0.0, ["1-000000-0", "1-000001-0", "1-000002-0"]),
     (-1.0, ["1-000000-0", "1-000001-0", "1-000002-0", "1-000003-0"])],
)  # fmt: skip
def test_threshold_0_keeps_the_unscored_and_minus_1_also_what_the_text_rules_dropped(threshold, expected):
    pairs, scores = make([(2, 2), (1, 1), None, (1, 1), (1, 1)])
    pairs[3] = dataclasses.replace(pairs[3], verdict=dropped("asks back"))
    pairs[4] = dataclasses.replace(pairs[4], verdict=dropped("unfinished"))
    assert decided(SelectConfig(threshold=threshold), pairs, scores[:3])[0] == expected


def likely(*distributions):
    """Pairs whose two scores have the same distribution, given as {score: probability}."""
    pairs, _ = make([(1, 1)] * len(distributions))
    scores = []
    for pair, chances in zip(pairs, distributions, strict=True):
        mean = sum(n * p for n, p in chances.items())
        score = Score(mean, None, 1.0, tuple(chances.get(n, 0.0) for n in range(1, 11)))
        scores.append(Scores(pair.id, score, score, KEPT))
    return pairs, scores


def test_the_probability_of_passing_ranks_otherwise_than_the_mean():
    # The first is never above 8 and the second is in half of all judgments, though its mean is lower.
    pairs, scores = likely({8: 1.0}, {5: 0.5, 9: 0.5})
    settings = {"rule": "top_fraction", "fraction": 0.5}
    assert decided(SelectConfig(**settings), pairs, scores)[0] == ["1-000000-0"]
    assert decided(SelectConfig(ranking="probability", **settings), pairs, scores)[0] == ["1-000001-0"]
    # Equal chances are told apart by the sum.
    pairs, scores = likely({7: 1.0}, {8: 1.0})
    assert decided(SelectConfig(ranking="probability", **settings), pairs, scores)[0] == ["1-000001-0"]


def test_random_threshold_keeps_as_many_as_the_threshold_but_others():
    scores = some_scores(400)
    best, _ = chosen(SelectConfig(threshold=6), scores, samples=2)
    drawn, reasons = chosen(SelectConfig(rule="random_threshold", threshold=6), scores, samples=2)
    other, _ = chosen(SelectConfig(rule="random_threshold", threshold=6), scores, samples=2, seed=1)
    assert len(drawn) == len(best) == len(other)
    assert len({tuple(best), tuple(drawn), tuple(other)}) == 3
    assert "not drawn" in reasons.values()


LIKELIHOOD = {"readings": ("likelihood",)}


def test_perplexity_keeps_up_to_its_limit():
    pairs, scores = likely_by([50.0, 50.01, 2.0, None])
    ids, reasons = decided(SelectConfig(rule="perplexity"), pairs, scores, **LIKELIHOOD)
    assert ids == ["1-000000-0", "1-000002-0"]
    assert (reasons["1-000001-0"], reasons["1-000003-0"]) == ("perplexity too high", "no perplexity")


def test_of_several_samples_the_least_surprising_stands_for_its_instruction():
    pairs, scores = likely_by([9.0, 3.0])
    pairs = [dataclasses.replace(pair, instruction_id="1-000000") for pair in pairs]
    assert decided(SelectConfig(rule="perplexity"), pairs, scores, **LIKELIHOOD)[0] == ["1-000001-0"]


def test_a_perplexity_is_of_the_reading_per_token_and_has_a_highest():
    assert perplexity(ReadingValue(-10 * math.log(3), 10)) == 3.0
    assert perplexity(ReadingValue(-1e9, 2)) == 1e9
    assert perplexity(ReadingValue(None, error="too long")) is perplexity(None) is perplexity(ReadingValue(0.0)) is None


def test_density_draws_one_of_each_cluster():
    pairs, scores = make([(1, 1)] * 60)
    clusters = {p.instruction_id: i % 3 for i, p in enumerate(pairs)}
    drawn = [decided(SelectConfig(rule="density"), pairs[k:], scores, clusters=clusters)[0] for k in (0, 3)]
    for ids in drawn:
        assert sorted(int(id[2:8]) % 3 for id in ids) == [0, 1, 2]
    assert drawn[0] != drawn[1]
    clusters[pairs[0].instruction_id] = None
    assert decided(SelectConfig(rule="density"), pairs, scores, clusters=clusters)[1][pairs[0].id] == "no embedding"


def test_density_with_perplexity_keeps_the_lowest_of_each_cluster():
    pairs, scores = likely_by([5.0, 1.5, 4.0, 1.5, 60.0, 2.0])
    clusters = {p.instruction_id: i % 2 for i, p in enumerate(pairs)}
    settings = SelectConfig(rule="density_perplexity")
    ids, reasons = decided(settings, pairs, scores, clusters=clusters, **LIKELIHOOD)
    assert ids == ["1-000001-0", "1-000002-0"]
    assert reasons["1-000003-0"] == "another of its cluster has a lower perplexity"


def test_buckets_may_be_clusters():
    pairs, scores = make([(9 - 8 * (i % 2), 9) for i in range(20)])
    clusters = {p.instruction_id: i % 2 for i, p in enumerate(pairs)}
    settings = SelectConfig(rule="top_fraction", fraction=0.4, buckets="clusters")
    ids, _ = decided(settings, pairs, scores, clusters=clusters)
    assert sorted(int(id[2:8]) % 2 for id in ids) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("share", "adds"), [(1.0, 8), (0.5, 5), (0.05, 1)])
def test_no_bucket_has_more_than_its_share_of_what_the_rule_keeps_and_its_best_stay(share, adds):
    words = ["Add"] * 8 + ["Count", "Swap"]
    settings = SelectConfig(buckets="opening", bucket_share=share)
    ids, reasons = chosen(settings, [(9, 9 + i / 10) for i in range(10)], text=lambda i: f"{words[i]} it.")
    assert ids == [f"1-00000{i}-0" for i in range(8 - adds, 10)]
    assert list(reasons.values()).count("more than its bucket's share") == 8 - adds


def test_top_up_to_takes_the_best_of_those_that_the_rule_dropped():
    scores = [(9, 9), (8, 8), (7, 9), (1, 1)]
    assert chosen(SelectConfig(), scores)[0] == ["1-000000-0"]
    assert chosen(SelectConfig(top_up_to=1), scores)[0] == ["1-000000-0"]
    assert chosen(SelectConfig(top_up_to=3), scores)[0] == ["1-000000-0", "1-000001-0", "1-000002-0"]
    # There are no more, and what has no score stays out.
    assert chosen(SelectConfig(top_up_to=9), [*scores, None])[0] == [f"1-00000{i}-0" for i in range(4)]
    assert len(chosen(SelectConfig(rule="random", fraction=0.25, top_up_to=3), scores)[0]) == 1


def test_a_second_turn_may_keep_nothing():
    pairs, scores = make([(1, 1)])
    assert kept(select(Config(), 1, pairs, scores, turn=2)) == []


def test_too_few_by_perplexity_say_the_lowest():
    with pytest.raises(UserError, match=r"perplexity: mean 70.00, lowest 70.00.*; raise select.perplexity \(now 50\)"):
        decided(SelectConfig(rule="perplexity"), *likely_by([70.0]), **LIKELIHOOD)


TOP = {"rule": "top_fraction", "fraction": 0.5}


def test_a_reading_ranks_pairs_and_what_it_has_no_value_for_is_dropped():
    pairs, scores = read(lift=[0.1, None, -0.5, 2.0])
    ids, reasons = decided(SelectConfig(**TOP), pairs, scores, readings=("lift",))
    # Half of the three that have a value, rounded.
    assert ids == ["1-000000-0", "1-000003-0"]
    assert (reasons["1-000001-0"], reasons["1-000002-0"]) == ("unscored", "not in the top fraction")


def test_of_several_samples_the_best_by_a_reading_stands_for_its_instruction_even_below_zero():
    pairs, scores = read(lift=[-0.5, -0.2, None])
    pairs = [dataclasses.replace(pair, instruction_id="1-000000") for pair in pairs]
    assert decided(SelectConfig(**TOP), pairs, scores, readings=("lift",))[0] == ["1-000001-0"]


def test_a_pair_in_a_blind_spot_counts_as_one_without_a_value():
    pairs, scores = read(lift=[9.0, 1.0, 2.0, 3.0])
    scores[0] = dataclasses.replace(scores[0], verdict=dropped("repeats itself"))
    ids, reasons = decided(SelectConfig(rule="top_fraction", fraction=0.34), pairs, scores, readings=("lift",))
    assert (ids, reasons["1-000000-0"]) == (["1-000003-0"], "repeats itself")
    # A rule that looks at no reading keeps it.
    assert pairs[0].id in decided(SelectConfig(rule="none"), pairs, scores, readings=("lift",))[0]


def test_the_record_says_what_the_readings_came_to_and_a_rubric_alone_leaves_that_out():
    pairs, scores = read(lift=[1.0, 2.0], likelihood=[-3.0, -1.0])
    config = Config(select=SelectConfig(**TOP), assess=AssessConfig(readings=("lift", "likelihood")))
    one, two = select(config, 1, pairs, scores)
    assert one.readings == {"lift": 1.0, "likelihood": -3.0}
    assert (one.ranked_by, two.ranked_by) == (0.0, 1.0)
    assert two.perplexity == round(math.e, 4)
    (alone,) = select(Config(), 1, *make([(9, 9)]))
    assert (alone.readings, alone.ranked_by, alone.rank, alone.sum) == (None, None, 18.0, 18.0)


def test_the_last_of_many_readings_decides_among_equals_of_all_others():
    names = ("lift", "backward_lift", "likelihood", "pairwise", "ending")
    count = 3000
    pairs, scores = read(**{name: [1.0] * count for name in names[:-1]}, ending=[n / count for n in range(count)])
    settings = SelectConfig(rule="top_fraction", fraction=0.01, ranking="lexicographic", buckets="none")
    ids, _ = decided(settings, pairs, scores, readings=names)
    assert ids == [pair.id for pair in pairs[-30:]]


def test_tasks_whose_responses_agree_too_much_or_too_little_are_dropped():
    pairs, scores = read(self_consistency=[0.0, 0.1, 0.4, 0.5, 1.0, 0.9])
    scores = [
        dataclasses.replace(s, readings={"self_consistency": ReadingValue(s.readings["self_consistency"].value / 10)})
        for s in scores
    ]
    pairs = [dataclasses.replace(p, instruction_id=f"1-00000{n // 2}") for n, p in enumerate(pairs)]
    settings = SelectConfig(rule="top_fraction", fraction=1.0, consistency=(0.2, 0.9))
    ids, reasons = decided(settings, pairs, scores, readings=("self_consistency",))
    assert ids == ["1-000003-0"]
    assert [reasons[p.id] for p in (pairs[0], pairs[5])] == ["agreement outside select.consistency"] * 2
