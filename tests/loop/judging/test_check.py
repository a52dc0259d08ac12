"""The check of a judge: its pairs, its figures against a plain computation, and what counts as a coin."""

import dataclasses
import itertools
import json
import random

import pytest

from isheep_jax.config import AssessConfig, Config, GuardConfig, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.judging import readings
from isheep_jax.loop.judging.check import WORSE, agreement, check, known_pairs, measure, pairs_of_file, pairs_of_seeds
from isheep_jax.loop.judging.reader import Reader, Reading
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import ReadingValue

SEEDS = [
    Seed(f"seed-{n}", f"Say what number {n} is.", "", f"It is the number {n}, one more than {n - 1}.")
    for n in range(1, 31)
]
TEXTS = {"generic": ["It depends."], "refusal": ["No."]}
SELECT = SelectConfig()


def scripted(monkeypatch, **functions):
    """Puts readings into the table: name -> value of a candidate, or (value, tokens)."""

    def reading(function):
        def read(reader, candidates):
            for i, candidate in reversed(list(enumerate(candidates))):
                value = function(candidate)
                yield i, value if isinstance(value, ReadingValue) else ReadingValue(value)

        return read

    for name, function in functions.items():
        blind = readings.READINGS[name].blind_to if name in readings.READINGS else frozenset()
        monkeypatch.setitem(readings.READINGS, name, Reading("", reading(function), blind_to=blind))


def checked(pairs, *names):
    reader = Reader(AssessConfig(readings=names), load("standard"), None, "text", "check")
    return [record for _, record in sorted(check(reader, pairs, bare=True), key=lambda item: item[0])]


def plain_auc(good, bad):
    return sum((g > b) + 0.5 * (g == b) for g, b in itertools.product(good, bad)) / (len(good) * len(bad))


def test_a_judge_that_knows_the_answers_passes_and_a_coin_does_not(monkeypatch):
    outputs = {seed.output for seed in SEEDS}
    rng = random.Random(0)
    scripted(monkeypatch, good=lambda c: float(c.response in outputs), coin=lambda c: rng.random())
    records = checked(pairs_of_seeds(SEEDS, TEXTS, 0), "good", "coin")
    good, coin = (measure(SELECT, [name], records) for name in ("good", "coin"))
    assert good.by_rule == ()
    # Another seed's output is good to a judge that does not look at the instruction.
    assert {kind: e.value for kind, e in good.kinds.items()} == {k: 1 - 0.5 * (k == "mismatch") for k in good.kinds}
    assert good.passes(GuardConfig())
    assert not good.passes(GuardConfig(min_auc=good.auc.value + 0.01))
    assert 0.2 < coin.auc.low < coin.auc.value < coin.auc.high < 0.8
    assert not coin.passes(GuardConfig(min_auc=0.0))


def test_auc_wins_and_ties_are_those_of_a_plain_count(monkeypatch):
    rng = random.Random(1)
    scripted(monkeypatch, noisy=lambda c: float(rng.randint(0, 4) + 2 * ("number" in c.response)))
    records = checked(pairs_of_seeds(SEEDS, TEXTS, 0), "noisy")
    result = measure(SELECT, ["noisy"], records)
    values = {(r.task, r.kind): r.scores.readings["noisy"].value for r in records}
    good = {task: value for (task, kind), value in values.items() if not kind}
    pairs = []
    for kind, estimate in result.kinds.items():
        bad = {task: value for (task, k), value in values.items() if k == kind}
        assert estimate.value == pytest.approx(plain_auc(good.values(), bad.values()), abs=1e-4)
        assert estimate.low <= estimate.value <= estimate.high
        pairs += [(good[task], value) for task, value in bad.items()]
    assert result.auc.value == pytest.approx(sum(e.value for e in result.kinds.values()) / len(result.kinds), abs=1e-3)
    assert result.wins == pytest.approx(sum((g > b) + 0.5 * (g == b) for g, b in pairs) / len(pairs), abs=1e-4)
    assert result.ties == pytest.approx(sum(g == b for g, b in pairs) / len(pairs), abs=1e-4)


def test_the_interval_shrinks_with_more_tasks(monkeypatch):
    rng = random.Random(2)
    scripted(monkeypatch, noisy=lambda c: rng.random() + 0.4 * ("number" in c.response))
    few, many = (measure(SELECT, ["noisy"], checked(pairs_of_seeds(SEEDS, TEXTS, 0, n), "noisy")).auc for n in (6, 30))
    assert many.high - many.low < 0.8 * (few.high - few.low)


def test_what_a_rule_drops_or_a_reading_has_no_value_for_is_lowest(monkeypatch):
    # A judge that loves echoes and loops, in a reading with rules against both; it has nothing to say of refusals.
    def love(c):
        if c.response == "No.":
            return ReadingValue(None, error="no value")
        return float(len(c.response))

    scripted(monkeypatch, lift=love)
    result = measure(SELECT, ["lift"], checked(pairs_of_seeds(SEEDS, TEXTS, 0), "lift"))
    assert [result.kinds[kind].value for kind in ("echo", "half echo", "looping", "refusal")] == [1.0] * 4
    # What a rule finds does not speak for the judge.
    assert {"echo", "half echo", "looping"} <= set(result.by_rule)
    left = [estimate.value for kind, estimate in result.kinds.items() if kind not in result.by_rule]
    assert result.auc.value == pytest.approx(sum(left) / len(left), abs=1e-3)


def test_what_stands_lowest_for_another_reason_than_the_judge_is_shown(monkeypatch):
    def love(c):
        return ReadingValue(None, error="no value") if c.response == "No." else float("number" in c.response)

    scripted(monkeypatch, lift=love)
    # Half of the good responses go round and round, which a rule finds.
    loops = [dataclasses.replace(seed, output=f"{seed.output} " * 3) for seed in SEEDS[:8]]
    found = measure(
        SELECT, ["lift"], checked(pairs_of_seeds([*loops, *SEEDS[8:16]], {"refusal": ["No."]}, 0, 16), "lift")
    )
    assert found.lost == 0.5
    assert 0 < found.unread < 0.2
    assert dataclasses.replace(found, unread=0.05).losses() == "; rules on the text drop 50% of the good responses"
    assert dataclasses.replace(found, lost=0.05, unread=0.5).losses() == "; 50% of the responses have no value"


def test_length_bias_and_agreement_are_rank_correlations(monkeypatch):
    longer = [dataclasses.replace(seed, output=seed.output + " And so on." * n) for n, seed in enumerate(SEEDS[:8])]
    scripted(
        monkeypatch, long=lambda c: float(len(c.response)), short=lambda c: -float(len(c.response)), flat=lambda c: 1.0
    )
    records = checked(pairs_of_seeds(longer, TEXTS, 0), "long", "short", "flat")
    assert measure(SELECT, ["long"], records).length == 1.0
    assert measure(SELECT, ["short"], records).length == -1.0
    assert measure(SELECT, ["flat"], records).length is None
    assert agreement(SELECT, "long", "short", records) == -1.0
    assert agreement(SELECT, "long", "flat", records) is None


def test_a_log_likelihood_counts_per_token_or_in_total_as_selection_does(monkeypatch):
    # In total, long responses lose; per token, they win.
    scripted(monkeypatch, nats=lambda c: ReadingValue(-(float(len(c.response)) ** 0.5), len(c.response)))
    records = checked(pairs_of_seeds(SEEDS, {}, 0), "nats")
    per_token, total = (measure(SelectConfig(per=per), ["nats"], records) for per in ("token", "total"))
    assert per_token.kinds["truncated"].value > 0.9
    assert total.kinds["truncated"].value < 0.1


def test_pairs_of_seeds_leave_out_seeds_without_an_output_and_long_ones():
    long = [Seed(f"long-{n}", "Write.", "", "word " * (99 + n)) for n in range(20)]
    seeds = [*SEEDS[:6], Seed("seed-empty", "Do nothing.", "", ""), *long]
    assert {pair.task for pair in pairs_of_seeds(seeds, TEXTS, 0)} == {seed.id for seed in SEEDS[:6]}
    # The shortest ones where there are hardly any others.
    tasks = {pair.task for pair in pairs_of_seeds(seeds[2:], TEXTS, 0)}
    assert tasks == {seed.id for seed in [*SEEDS[2:6], *long[:12]]}
    assert len({pair.task for pair in pairs_of_seeds(SEEDS, TEXTS, 0, limit=10)}) == 10
    pairs = pairs_of_seeds(SEEDS, TEXTS, 0)
    assert pairs == pairs_of_seeds(SEEDS, TEXTS, 0)
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_a_file_gives_better_and_worse_responses(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"Add {n}.", "input": "1", "better": f"{n + 1}", "worse": "0"} for n in range(9)]
    del rows[0]["input"]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    pairs = pairs_of_file(str(path))
    assert [(p.kind, p.input, p.response) for p in pairs[:4]] == [
        ("", "", "1"),
        (WORSE, "", "0"),
        ("", "1", "2"),
        (WORSE, "1", "0"),
    ]
    assert len(pairs_of_file(str(path), limit=4)) == 8
    scripted(monkeypatch, good=lambda c: float(c.response))
    result = measure(SELECT, ["good"], checked(pairs, "good"))
    assert list(result.kinds) == [WORSE]
    assert result.auc == result.kinds[WORSE]
    assert result.auc.value == 1.0


GOOD_LINE = '{"instruction": "a", "better": "b", "worse": "c"}'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "[]",
        '{"instruction": "a", "better": "b"}',
        GOOD_LINE.replace('"b"', r'"\ud800"'),
        "[" * 100_000,
        *(GOOD_LINE.replace(f'"{text}"', bad) for text in "abc" for bad in ('""', '" "', "3")),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{line}\n")
    with pytest.raises(UserError, match=r"^guard\.pairs: .*pairs\.jsonl, line 3"):
        pairs_of_file(str(path))


def test_a_file_that_is_not_there_or_too_short_is_refused_by_name(tmp_path):
    path = tmp_path / "pairs.jsonl"
    config = Config(guard=GuardConfig(pairs=str(path)))
    with pytest.raises(UserError, match=r"^guard\.pairs: cannot read .*pairs\.jsonl: No such file"):
        known_pairs(config, [], load("standard"))
    lines = [GOOD_LINE.replace('"a"', f'"a {n}"') for n in range(40)]
    path.write_text("\n".join(lines[:4]))
    with pytest.raises(UserError, match="has 4 different tasks; the check of the judge needs at least 5"):
        known_pairs(config, [], load("standard"))
    # A file of Windows, without an input.
    path.write_text("\ufeff" + "".join(f'{x[:-1]}, "input": null}}\r\n' for x in lines), encoding="utf-8")
    assert len(known_pairs(config, [], load("standard"))) == 80


def test_repeated_lines_and_seeds_are_no_more_tasks(tmp_path):
    path = tmp_path / "pairs.jsonl"
    config = Config(guard=GuardConfig(pairs=str(path)))
    lines = [GOOD_LINE.replace('"a"', f'"a {n}"') for n in range(4)]
    path.write_text("\n".join([*lines, *lines, lines[0].replace('"a 0"', '" A  0 "'), lines[0].replace('"b"', '"d"')]))
    assert len(pairs_of_file(str(path))) == 10
    with pytest.raises(UserError, match="has 4 different tasks"):
        known_pairs(config, [], load("standard"))
    path.write_text("\n".join([*lines, GOOD_LINE]))
    assert len(known_pairs(config, [], load("standard"))) == 10
    few = [dataclasses.replace(seed, id=f"{seed.id}-{n}") for n in range(9) for seed in SEEDS[:4]]
    with pytest.raises(UserError, match=r"synthesize\.seeds: 4 different ones have an output"):
        known_pairs(Config(), few, load("standard"))


def test_responses_are_compared_with_those_of_other_standing(monkeypatch):
    others = {}
    scripted(monkeypatch, pairwise=lambda c: float(len(others.setdefault(c.id, c.others))))
    records = checked(pairs_of_seeds(SEEDS[:2], TEXTS, 0), "pairwise")
    good, *bad = [r for r in records if r.task == "seed-1"]
    assert others[good.id] == tuple(r.response for r in bad)
    assert {others[r.id] for r in bad} == {(good.response,)}
