import random

import pytest

from isheep_jax.loop.novelty import Pool, normalise, rouge_l, tokenize


def lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def slow(pool, text, limit):
    """Whether any member is too similar, by the definition."""
    a = tokenize(text)
    for other in pool:
        b = tokenize(other)
        if a and b and rouge_l(lcs(a, b), len(a), len(b)) > limit:
            return True
    return any(" ".join(other.split()) == " ".join(text.split()) for other in pool)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_pool_admits_what_the_definition_admits(limit):
    rng = random.Random(f"novelty {limit}")
    texts = [" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(0, 14))) + rng.choice(" .") for _ in range(400)]
    pool, admitted = Pool(limit), []
    for start in range(0, 400, 80):
        block = texts[start : start + 80]
        verdicts = pool.admit([str(start + i) for i in range(80)], block, [""] * 80)
        for text, verdict in zip(block, verdicts):
            assert (verdict is not None) == slow(admitted, text, limit)
            if verdict is None:
                admitted.append(text)
    assert len(pool) == len(admitted)


def test_the_neighbour_is_the_most_similar_and_then_the_earliest():
    pool = Pool(0.5)
    for id, text in (("a", "one two three x"), ("b", "one two three four five"), ("c", "one two three four six")):
        pool.add(id, text)
    (near,) = pool.admit(["d"], ["one two three four"], [""])
    assert (near.id, near.similarity) == ("b", pytest.approx(8 / 9))


def test_a_tie_with_the_limit_falls_as_in_rouge_score():
    # m = 7, n = 13, LCS = 7: 0.7000000000000001; m = n = 10, LCS = 7: 0.7 exactly, which is not above it.
    assert rouge_l(7, 7, 13) > 0.7
    assert not rouge_l(7, 10, 10) > 0.7
    pool = Pool(0.7)
    pool.add("a", " ".join("abcdefg"))
    assert pool.admit(["b"], [" ".join("abcdefg123456")], [""])[0]
    pool.add("c", " ".join("mnopqrstuv"))
    assert pool.admit(["d"], [" ".join("mnopqrs789")], [""]) == [None]


def test_the_f1_of_rouge_score_is_met_bit_for_bit():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(5)
    for _ in range(300):
        a, b = (" ".join(rng.choice("abcdef") for _ in range(rng.randint(1, 20))) for _ in range(2))
        ours = rouge_l(lcs(a.split(), b.split()), len(a.split()), len(b.split()))
        assert ours == scorer.score(a, b)["rougeL"].fmeasure


def test_a_limit_of_one_drops_only_exact_repetitions():
    pool = Pool(1.0)
    texts = ["Say it.", "say it", "Say  it.", "Say it."]
    assert [v is None for v in pool.admit(list("abcd"), texts, [""] * 4)] == [True, True, False, False]
    assert pool.admit(["e"], ["Say it."], ["with an input"]) == [None]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't STOP, it's 3.5!", ["don", "t", "stop", "it", "s", "3", "5"]),
        ("snake_case-word", ["snake", "case", "word"]),
        ("Überprüfe die Größe", ["überprüfe", "die", "größe"]),
        ("U\u0308ber", ["über"]),
        ("写一首诗 about 3 birds", ["写", "一", "首", "诗", "about", "3", "birds"]),
        ("ひらがな", ["ひ", "ら", "が", "な"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("?!", []),
    ],
)
def test_tokens_are_words_of_any_script(text, tokens):
    assert tokenize(text) == tokens


def test_the_same_instruction_in_another_dress_is_the_same():
    assert normalise("Count the WORDS: a, b!") == normalise("count the words a b")
