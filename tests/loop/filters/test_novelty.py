import itertools
import json
import os
import random
from pathlib import Path

import pytest

from isheep_jax.loop.filters import rouge
from isheep_jax.loop.filters.normalization import tokenize
from isheep_jax.loop.filters.novelty import Pool, RestartingPool, rouge_l
from isheep_jax.loop.prompting import templates
from isheep_jax.loop.prompting.seeds import read_seeds


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        ("Write a function in C# that adds.", "Write a function in C++ that adds.", 2 * 7 / 17),
        ("What is 2 - 2?", "What is 2 + 2?", 0.8),
        ("What is C?", "What is C++?", 2 * 3 / 8),
        ("Is 5 < 3?", "Is 5 > 3?", 0.75),
        ("Explain -5.", "Explain 5!", 0.8),
        ("Is a well-known man, he?", "“Is a well known man – he”", 1.0),
    ],
)
def test_symbols_count_where_the_words_are_the_same(one, other, similarity):
    pool = Pool(0.6)
    pool.add("first", one)
    (near,) = pool.admit(["second"], [other], [""])
    assert near.similarity == pytest.approx(similarity)
    (within,) = Pool(0.6).admit(["first", "second"], [one, other], ["", ""])[1:]
    assert within.similarity == pytest.approx(similarity)
    assert Pool(0.9).admit(["first", "second"], [one, other], ["", ""])[1] is None or similarity > 0.9


def lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def lcs_by_bits(a, b):
    """The same, fast (Hyyrö, 2004): bit i of `row` is clear where the LCS with a[: i + 1] grows."""
    where = {}
    for i, x in enumerate(a):
        where[x] = where.get(x, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for y in b:
        common = row & where.get(y, 0)
        row = (row + common | row - common) & full
    return len(a) - row.bit_count()


def verdicts_by_definition(items, limit):
    """For each (instruction, input): None, or the index of the most similar one kept before, the earliest of several.

    The formula is written out here as `rouge_score` has it.
    """
    kept, verdicts = [], []
    for i, (instruction, input) in enumerate(items):
        a, key = tokenize(instruction), (instruction.split(), input.split())
        best = (0.0, 0)
        for j, b, _ in kept:
            if not a or not b or 2 * min(len(a), len(b)) / (len(a) + len(b)) < limit - 1e-6:
                continue
            common = lcs_by_bits(a, b)
            precision, recall = common / len(a), common / len(b)
            f1 = 2 * precision * recall / (precision + recall) if common else 0.0
            if f1 > limit and f1 > best[0]:
                best = (f1, j)
        exact = [j for j, _, other in kept if other == key]
        verdicts.append(best[1] if best[0] else exact[0] if exact else None)
        if verdicts[-1] is None:
            kept.append((i, a, key))
    return verdicts


def verdicts_of_pool(items, limit, blocks=(1, 7, 90), **settings):
    """The same from a pool, asked in blocks of several sizes."""
    pool, verdicts, sizes = Pool(limit, **settings), [], itertools.cycle(blocks)
    while len(verdicts) < len(items):
        start = len(verdicts)
        block = items[start : start + next(sizes)]
        ids = [str(start + i) for i in range(len(block))]
        near = pool.admit(ids, [text for text, _ in block], [input for _, input in block])
        verdicts += [int(n.id) if n else None for n in near]
    assert len(pool) == sum(v is None for v in verdicts)
    return verdicts


def varied(texts, count, seed):
    """count texts: the given ones, and then copies of earlier ones with a few words replaced, swapped or left out."""
    rng = random.Random(seed)
    words = [word for text in texts for word in text.split()]
    made = list(texts)
    while len(made) < count:
        text = rng.choice(made).split()
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            change = rng.choice(["replace", "insert", "drop", "swap"])
            if change == "replace":
                text[place] = rng.choice(words)
            elif change == "insert":
                text.insert(place, rng.choice(words))
            elif change == "drop" and len(text) > 1:
                del text[place]
            else:
                text[place], text[-1] = text[-1], text[place]
        made.append(" ".join(text))
    rng.shuffle(made)
    return made[:count]


def real_instructions():
    """Instructions of a JSON Lines file (fields instruction or prompt) that the environment names."""
    path = os.environ.get("ISHEEP_JAX_INSTRUCTIONS")
    if not path:
        pytest.skip("ISHEEP_JAX_INSTRUCTIONS names no JSON Lines file with instructions")
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(row.get("instruction") or row["prompt"]) for row in rows][:2000]


@pytest.fixture(params=["lists", "scan", "no index"])
def segment(request, monkeypatch):
    """Size of an indexed segment, with each of the two ways through an index, and too large for any index."""
    monkeypatch.setattr(rouge, "_LIST_COST", 0 if request.param == "lists" else 1e9)
    # So that texts of this size, too, are compared in many pieces.
    monkeypatch.setattr(rouge, "_CACHED", 64)
    monkeypatch.setattr(rouge, "_BATCH", 100)
    return 10**6 if request.param == "no index" else 40


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.5, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("letters", [4, 8, 60])
def test_random_token_sequences_fall_as_by_the_definition(limit, letters, segment):
    rng = random.Random(f"novelty {limit} {letters}")
    tokens = [f"t{i}" for i in range(letters)]

    def text():
        # Frequencies fall like those of words; a full stop alone is a text without tokens.
        drawn = [tokens[min(int(rng.paretovariate(0.7)) - 1, letters - 1)] for _ in range(rng.randint(0, 14))]
        return " ".join([*drawn, "."])

    items = [(text, rng.choice(["", "x"])) for text in varied([text() for _ in range(300)], 500, limit)]
    assert verdicts_of_pool(items, limit, segment=segment) == verdicts_by_definition(items, limit)


@pytest.fixture(scope="module")
def two_thousand():
    """Instructions made from the built-in seeds, with their verdicts by the definition."""
    seeds = read_seeds(templates.load("standard").seeds_file("builtin"), 1)
    items = [(text, "") for text in varied([s.instruction for s in seeds], 2000, "instructions")]
    return items, verdicts_by_definition(items, 0.7)


def test_two_thousand_instructions_fall_as_by_the_definition(two_thousand, segment):
    items, expected = two_thousand
    assert 500 < sum(v is None for v in expected) < 1950
    assert verdicts_of_pool(items, 0.7, segment=segment) == expected


def test_instructions_of_a_file_fall_as_by_the_definition(segment):
    items = [(text, "") for text in real_instructions()]
    assert verdicts_of_pool(items, 0.7, segment=segment) == verdicts_by_definition(items, 0.7)


def test_long_texts_fall_as_by_the_definition(segment):
    rng = random.Random("long")
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(rng.choices(words, k=rng.choice([3, 70, 130, 300]))) for _ in range(60)]
    items = [(text, "") for text in varied(texts, 300, "long texts")]
    expected = verdicts_by_definition(items, 0.7)
    assert any(v is not None for v in expected)
    assert verdicts_of_pool(items, 0.7, segment=segment) == expected


def test_more_tokens_than_code_points_change_nothing(monkeypatch):
    rng = random.Random("wrapped")
    items = [(" ".join(f"w{rng.randrange(90)}" for _ in range(rng.randint(1, 9))), "") for _ in range(400)]
    expected = verdicts_by_definition(items, 0.5)
    assert verdicts_of_pool(items, 0.5) == expected
    monkeypatch.setattr(rouge, "_CODE_POINTS", 5)
    assert verdicts_of_pool(items, 0.5, segment=50) == expected


def test_one_block_is_the_same_as_one_after_the_other():
    seeds = [s.instruction for s in read_seeds(templates.load("standard").seeds_file("builtin"), 1)]
    items = [(text, "") for text in varied(seeds[:40], 200, "blocks")]
    assert verdicts_of_pool(items, 0.7, blocks=(200,)) == verdicts_of_pool(items, 0.7, blocks=(1,))


def test_added_and_admitted_instructions_are_one_pool():
    items = [(text, "") for text in varied(["one two three four five six", "seven eight nine ten"], 300, "added")]
    pool = Pool(0.7, segment=20)
    for i, (text, _) in enumerate(items[:150]):
        pool.add(str(i), text)
    assert len(pool) == 150
    near = pool.admit([str(i) for i in range(150, 300)], [text for text, _ in items[150:]], [""] * 150)
    # The added ones are members whether new or not.
    for verdict, (text, _) in zip(near, items[150:]):
        a = tokenize(text)
        similar = [tokenize(other) for other, _ in items[:150]]
        if any(rouge_l(lcs(a, b), len(a), len(b)) > 0.7 for b in similar):
            assert verdict is not None


def test_the_neighbor_is_the_most_similar_and_then_the_earliest():
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


# m of all ties that rouge_score 0.1.2 puts above 0.7, by (m + n, LCS): made with its RougeScorer(["rougeL"]).
ABOVE = {
    (20, 7): [7, 8, 9, 11, 12, 13],
    (40, 14): [14, 15, 16, 18, 22, 24, 25, 26],
    (60, 21): [21, 22, 24, 25, 27, 33, 35, 36, 38, 39],
}


@pytest.mark.parametrize(("total", "common"), list(ABOVE))
def test_all_ties_at_the_limit_fall_as_in_rouge_score(total, common, segment):
    pool, above = Pool(0.7, segment=segment), []
    for m in range(common, total - common + 1):
        shared, first, second = (
            " ".join(f"{side}{m}x{i}" for i in range(count))
            for side, count in (("c", common), ("a", m - common), ("b", total - m - common))
        )
        pool.add(f"first {m}", f"{shared} {first}")
        (near,) = pool.admit(["second"], [f"{shared} {second}"], [""])
        if near:
            above.append(m)
            assert near.id == f"first {m}"
    assert above == ABOVE[total, common]


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


def test_other_scripts_are_compared_by_their_own_words():
    pool = Pool(0.7)
    texts = {
        "zh": "请用三句话介绍长江的历史",
        "zh near": "请用两句话介绍长江的历史",
        "zh other": "请把下面的句子翻译成英文",
        "ja": "次の文章を丁寧な言い方に直してください",
        "hi": "नीचे दिए गए वाक्य का अंग्रेज़ी में अनुवाद करो",
        "hi near": "नीचे दिए गए वाक्य का जर्मन में अनुवाद करो",
        "ar": "اكتب رسالة قصيرة إلى صديقك عن رحلتك الأخيرة",
        "ar near": "اكتب رسالة طويلة إلى صديقك عن رحلتك الأخيرة",
    }
    near = dict(zip(texts, pool.admit(list(texts), list(texts.values()), [""] * len(texts))))
    assert {id: n.id for id, n in near.items() if n} == {"zh near": "zh", "hi near": "hi", "ar near": "ar"}


def test_a_restarting_pool_forgets_after_so_many_were_kept():
    def seeds() -> Pool:
        pool = Pool(0.7)
        pool.add("seed", "Name the four seasons of the year.")
        return pool

    texts = [
        "Sort these towns by size.",
        "Sort these towns by size!",
        "Write a poem about rain.",
        "Sort these towns by size.",
    ]
    texts += ["Name the four seasons of the year."]
    ids = [str(i) for i in range(len(texts))]
    one_by_one, at_once = RestartingPool(seeds, every=2), RestartingPool(seeds, every=2)
    verdicts = at_once.admit(ids, texts, [""] * len(texts))
    # The third is the second that is kept, so the fourth repeats nothing that is remembered; the seeds stay.
    assert [near.id if near else None for near in verdicts] == [None, "0", None, None, "seed"]
    assert verdicts == [one_by_one.admit([i], [t], [""])[0] for i, t in zip(ids, texts)]
    replayed = RestartingPool(seeds, every=2)
    for i in (0, 2, 3):
        replayed.add(ids[i], texts[i])
    assert replayed.admit(["x"], [texts[3]], [""])[0].id == "3"
    assert replayed.admit(["y"], [texts[2]], [""]) == [None]
