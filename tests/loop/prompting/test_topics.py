"""Topics: what counts as one, how the pools grow, and which line answers which hint."""

import json
import re

import pytest
from scripted_backend import Fuse, Killed, ScriptedModel, context_of, tiny_config

from isheep_jax.config import SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.novelty import Pool
from isheep_jax.loop.prompting import topics
from isheep_jax.loop.prompting.few_shot import FewShot
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.shown import SeedPool
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.prompting.topics import (
    Hint,
    Topic,
    Topics,
    Type,
    brainstorm,
    hints,
    read_topics,
    read_types,
    topic_reason,
)
from isheep_jax.loop.records import KEPT, dropped, kept
from isheep_jax.loop.stages.synthesize import synthesize

TYPES = [Type("Law", "Sublets", "May I sublet?"), Type("News", "Ferries", "Do the ferries run?")]
SEEDS = [Seed(f"seed-{i:03d}", f"Do the thing number {i} quickly.", "", "") for i in range(8)]
TEMPLATES = load("standard", ("synthesize", "topics", "guided"))


def config(tmp_path, **changes):
    settings = {"instructions": 10, "shots": 3, "method": "topics", "topic_share": 1.0, "novelty": 1.0}
    return tiny_config(tmp_path, synthesize=SynthesizeConfig(**{**settings, **changes}))


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("Ferry delays", None),
        ("Rock 'n' roll", None),
        ("CO2", None),
        ("Überstunden", None),
        ("渡船", None),
        ("Ferry delays in winter", "too long"),
        ("Delays in winter", None),
        ("ferry delays", "not a noun phrase"),
        ("Is tea healthy", "not a noun phrase"),
        ("Island ferries", None),
        ("What is tea", "not a noun phrase"),
        ("Whatever tea", None),
        ("Ferries; buses", "not a noun phrase"),
        ("Ferries (winter)", "not a noun phrase"),
    ],
)
def test_a_topic_is_a_short_name(topic, reason):
    assert topic_reason(topic) == reason


@pytest.mark.parametrize(
    ("text", "finished", "found"),
    [
        (" Tides\n- Bus fares.\n* Rain\n", True, ["Tides", "Bus fares", "Rain"]),
        (" Tides\n- Bus fares\n- Ra", False, ["Tides", "Bus fares"]),
        (" Tides\n2. Bus fares\n3) Rain", True, ["Tides", "Bus fares", "Rain"]),
        ("\n".join(f"- T{n}" for n in range(30)), True, [f"T{n}" for n in range(20)]),
        ("", True, []),
    ],
)
def test_a_completion_is_read_line_by_line(text, finished, found):
    assert read_topics(text, finished) == found


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"type": "Law", "topic": "Sublets"}',
        '{"type": "Law", "topic": "", "question": "q"}',
        '{"type": "Law (new)", "topic": "t", "question": "q"}',
        '{"type": "Law", "topic": "a; b", "question": "q"}',
        '{"type": 1, "topic": "t", "question": "q"}',
    ],
)
def test_a_bad_line_of_types_is_named(tmp_path, line):
    path = tmp_path / "topics.jsonl"
    good = json.dumps({"type": "News", "topic": "Ferries", "question": "q"})
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=r"topics\.jsonl, line 3") as e:
        read_types(path)
    assert "\n" not in str(e.value)
    path.write_text(f"{good}\n{good.replace('News', 'NEWS')}")
    with pytest.raises(UserError, match="line 2: the type 'NEWS' is there already"):
        read_types(path)


def test_the_types_that_come_with_the_prompts_are_whole():
    types = read_types(TEMPLATES.directory / "topics.jsonl")
    assert len(types) == 20
    assert {topic_reason(t.topic) for t in types} == {None}


class Says(ScriptedModel):
    """Lists the topics that `lists(type, round, prompt)` gives, and answers every hint."""

    def __init__(self, lists=None, fuse=None):
        super().__init__("says", fuse or Fuse())
        self.lists = lists or (lambda type, round, n: [f"Topic {round}{n}{i}" for i in range(12)])

    def complete(self, request):
        self.fuse.tick()
        if "/topics/" in request.id:
            round, index, n = map(int, request.id.split("/")[2:])
            lines = self.lists(TYPES[index].name, round, n)
            return Completion(request.id, " " + "\n- ".join(lines) + "\n")
        if "Hints:" not in request.prompt:
            return Completion(request.id, f" Do other things, number {request.id}.")
        asked = re.findall(r"\d\. \(.*\)", request.prompt.rpartition("Hints:")[2])
        return Completion(request.id, "\n".join(f"{h} So what about {h} today?"[2:] for h in asked))


def place(tmp_path, **changes):
    return context_of(config(tmp_path, **changes), templates=TEMPLATES, seeds=SEEDS)


def listed(tmp_path, model, **changes):
    return brainstorm(place(tmp_path, **changes), model, TYPES)


def test_pools_grow_by_rounds_until_every_type_has_its_share(tmp_path):
    model = Says(lambda type, round, n: [f"Topic {round}{n}{i}" for i in range(3 if type == "Law" else 12)])
    records = listed(tmp_path, model)
    pools = {t.name: [r for r in kept(records) if r.type == t.name] for t in TYPES}
    assert {name: len(pool) for name, pool in pools.items()} == {"Law": 12, "News": 12}
    assert {r.round for r in pools["Law"]} == {0, 1, 2, 3}
    assert {r.round for r in pools["News"]} == {0}
    # The prompts of a round show what the rounds before it brought.
    assert "- Sublets\n-" in model.prompts["1/topics/0/0/0"]
    assert model.prompts["1/topics/3/0/0"].count("\n- Topic") >= 4
    assert all(p.startswith(TEMPLATES.prefix("topics")) for p in model.prompts.values())


def test_the_prompts_are_spread_over_the_rounds_and_make_up_for_what_a_round_lacks(tmp_path):
    model = Says(lambda type, round, n: [] if round < 7 else [f"Topic {round}-{n}-{i}" for i in range(12)])
    listed(tmp_path, model, instructions=450)
    asked = [sum(id.startswith(f"1/topics/{round}/0/") for id in model.prompts) for round in range(topics.ROUNDS)]
    assert asked == [5, 6, 7, 8, 9, 12, 15, 23, 18]


def test_no_topic_comes_twice_in_a_type_in_whatever_case(tmp_path):
    model = Says(lambda type, round, n: ["Sublets", "SUBLETS", "Tides", f"TIDES {round}", "tides"])
    records = listed(tmp_path, model)
    law = [r for r in records if r.type == "Law" and r.round == 0]
    assert [r.verdict.reason for r in law] == ["there already"] * 2 + ["", "", "not a noun phrase"]
    # What a type has already may be new for another.
    assert "Sublets" in [r.topic for r in kept(records) if r.type == "News"]
    assert {r.round for r in records} == set(range(topics.ROUNDS))


def test_topics_that_were_killed_in_a_round_resume_to_the_same_bytes(tmp_path):
    def few(type, round, n):
        return [f"Topic {round}{i}" for i in range(4)]

    whole = listed(tmp_path / "whole", Says(few))
    with pytest.raises(Killed):
        listed(tmp_path / "cut", Says(few, Fuse(6)))
    assert (tmp_path / "cut" / "iteration_1" / "topics" / "part-00000.jsonl").exists()
    model = Says(few)
    assert listed(tmp_path / "cut", model) == whole
    assert not any("/topics/0/" in id for id in model.prompts)
    for part in (tmp_path / "whole" / "iteration_1" / "topics").glob("part-*"):
        assert part.read_bytes() == (tmp_path / "cut" / "iteration_1" / "topics" / part.name).read_bytes()


def topic(type, name, verdict=KEPT):
    return Topic("", type, name, 0, 0, verdict)


def test_hints_take_the_types_in_turn():
    records = [topic("Law", "A"), topic("Law", "B"), topic("Law", "C", dropped("too long")), topic("News", "D")]
    assert [str(h) for h in hints(TYPES, records)] == ["(Law; A)", "(News; D)", "(Law; B)"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" (Law; Rent) May I?\n2. (News; Rain) Does it rain?", [("May I?", ""), ("Does it rain?", "")]),
        (" (law; RENT): May I?", [("May I?", "")]),
        (" (Law; Rents) May I?", [("(Law; Rents) May I?", "answers no hint")]),
        (" May I?", [("May I?", "answers no hint")]),
        (" (Law; Rent) May I?\n(Law; Rent) And must I?", [("May I?", ""), ("And must I?", "hint is answered already")]),
        (" (News; Rent) May I?", [("(News; Rent) May I?", "answers no hint")]),
    ],
)
def test_a_line_counts_when_it_repeats_a_hint_that_is_open(tmp_path, text, found):
    source = Topics(place(tmp_path), TYPES, [Hint("Law", "Rent"), Hint("News", "Rain")])
    assert [(x.instruction, x.reason) for x in source.parse(0, Completion("", text))] == found
    cut = source.parse(0, Completion("", text, finish_reason="length"))
    assert cut[-1].reason == "unfinished"
    assert [(x.instruction, x.reason) for x in cut[:-1]] == found[:-1]


def written(tmp_path, model, count, **changes):
    context = place(tmp_path, **changes)
    source = Topics(context, TYPES, [Hint("Law", f"Rent {n}") for n in range(count)])
    return synthesize(context, model, Pool(1.0), [source, FewShot(context, SeedPool(context.seeds))])


def test_topics_give_their_share_and_seeds_the_rest(tmp_path):
    model = Says()
    records = written(tmp_path, model, 40, instructions=40, topic_share=0.5)
    about = [r for r in kept(records) if r.hint]
    assert (len(kept(records)), len(about)) == (40, 40 - sum(r.hint is None for r in kept(records)))
    assert len(about) >= 20
    assert len({r.hint for r in about}) == len(about)
    assert set(about[0].seeds) == {"Law", "News"}
    manifest = json.loads((tmp_path / "iteration_1" / "instructions" / "DONE").read_text())
    assert manifest["counts"]["from topics"] == len(about)
    rest = [r for r in kept(records) if not r.hint]
    assert rest
    assert all(s.startswith("seed-") for s in rest[0].seeds)
    assert min(r.prompt for r in rest) > max(r.prompt for r in about)


def test_when_all_hints_are_asked_the_seeds_give_the_rest(tmp_path):
    records = written(tmp_path, Says(), 12, instructions=40, topic_share=1.0)
    assert sum(r.hint is not None for r in kept(records)) == 12
    assert len(kept(records)) == 40


def test_instructions_from_topics_resume_to_the_same_bytes(tmp_path):
    whole = written(tmp_path / "whole", Says(), 60, instructions=70, topic_share=0.8)
    for at in (5, 20, 40):
        path = tmp_path / str(at)
        with pytest.raises(Killed):
            written(path, Says(fuse=Fuse(at)), 60, instructions=70, topic_share=0.8)
        assert written(path, Says(), 60, instructions=70, topic_share=0.8) == whole
        for part in (path / "iteration_1" / "instructions").glob("part-*"):
            assert part.read_bytes() == (tmp_path / "whole" / "iteration_1" / "instructions" / part.name).read_bytes()
