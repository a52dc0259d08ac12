"""Examples by similarity: what the prompts show, what is read from the completions, and that the loop resumes."""

import dataclasses
import json
import math

import pytest
from scripted_backend import (
    NOUNS,
    VERBS,
    ScriptedBackend,
    ScriptedModel,
    SilentReporter,
    evaluator,
    number,
    tiny_config,
)

from isheep_jax.config import AssessConfig, RespondConfig, RetrievalConfig, SelectConfig, SFTConfig, SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.prompting.similar import check_template, stops_of
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import Instruction, Pair, Selected, ShownExamples, from_line, kept

SEEDS = [
    {"question": f"{verb} {n} {noun}?", "answer": f"{noun} {n}"}
    for n, (verb, noun) in enumerate(zip(VERBS, NOUNS, strict=True))
]


class WritingModel(ScriptedModel):
    """Writes one question where it is asked for one; now and then none, or without an end."""

    def __init__(self, name, fuse):
        super().__init__(name, fuse)
        self.stops = {}

    def asked(self, request, sampling):
        super().asked(request, sampling)
        self.stops[request.id] = sampling.stop

    def complete(self, request):
        if "/synthesize/" not in request.id:
            return super().complete(request)
        rng = number(self.name, request.id)
        text = f" {rng.choice(VERBS)} {rng.randint(2, 99)} {rng.choice(NOUNS)}? "
        return Completion(
            request.id, text if rng.random() < 0.9 else " ", finish_reason=rng.choice(["stop"] * 4 + ["length"])
        )


class WritingBackend(ScriptedBackend):
    def model(self, name):
        return WritingModel(name, self.fuse)


def config(path, **changes):
    path.mkdir(parents=True, exist_ok=True)
    (path.parent / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in SEEDS))
    settings = {
        "synthesize": SynthesizeConfig(
            method="retrieved", seeds=str(path.parent / "seeds.jsonl"), instructions=20, novelty=1.0, rules="basic"
        ),
        "respond": RespondConfig(method="retrieved", rules="basic"),
        "retrieval": RetrievalConfig(examples=3, pool="seeds_and_kept"),
        "assess": AssessConfig(readings=()),
        "select": SelectConfig(rule="none"),
    }
    return tiny_config(path, **{**settings, **changes})


def go(config, backend=None):
    backend = backend or WritingBackend()
    return run(config, backend, {"fake": evaluator}, frozenset(), SilentReporter()), backend


def lines(path, cls):
    return [from_line(cls, line) for part in sorted(path.glob("part-*")) for line in part.read_text().splitlines()]


def prompts_of(backend):
    return {id: prompt for model in backend.models for id, prompt in model.prompts.items()}


def cosine(one, two):
    one, two = ([text.count(letter) for letter in "aeioustr"] for text in (one, two))
    return sum(a * b for a, b in zip(one, two)) / math.hypot(*one) / math.hypot(*two)


def nearest(question, pool, count):
    """Pairs of the pool, as (question, answer), the nearest last; of equals the first of the pool is nearer."""
    order = sorted(range(len(pool)), key=lambda i: (-round(cosine(question, pool[i][0]), 3), i))
    return [pool[i] for i in reversed(order[:count])]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("retrieved") / "run"
    rows, backend = go(config(path))
    return path, rows, backend


def pool_of(path, iteration):
    pairs = [(seed["question"], seed["answer"]) for seed in SEEDS]
    for n in range(1, iteration):
        pairs += [(s.instruction, s.response) for s in kept(lines(path / f"iteration_{n}" / "selected", Selected))]
    return pairs


@pytest.mark.parametrize("iteration", [1, 2])
def test_an_answer_is_written_after_the_pairs_nearest_to_its_question(finished, iteration):
    path, _, backend = finished
    pool, prompts = pool_of(path, iteration), prompts_of(backend)
    assert len(pool) > len(SEEDS) or iteration == 1
    pairs = lines(path / f"iteration_{iteration}" / "responses", Pair)
    assert len(pairs) == 20
    agree = 0
    for pair in pairs:
        shown = nearest(pair.instruction, pool, 3)
        text = "".join(f"### Question\n{q}\n\n### Answer\n{a}\n\n" for q, a in shown)
        prompt = f"{text}### Question\n{pair.instruction}\n\n### Answer"
        agree += prompts[f"{iteration}/respond/{pair.instruction_id}/0"] == prompt
    # All but those whose nearest differ by less than this test's cosines are rounded to.
    assert agree >= 18


def test_a_question_is_written_after_a_pair_drawn_at_random_and_its_neighbors(finished):
    path, _, backend = finished
    prompts, anchors = prompts_of(backend), set()
    ids = {f"seed-{n:03d}": (seed["question"], seed["answer"]) for n, seed in enumerate(SEEDS, start=1)}
    for record in lines(path / "iteration_1" / "instructions", Instruction):
        shown = [ids[id] for id in record.seeds]
        text = "".join(f"### Question\n{q}\n\n### Answer\n{a}\n\n" for q, a in shown)
        assert prompts[f"1/synthesize/{record.prompt}"] == f"{text}### Question"
        *others, anchor = shown
        anchors.add(anchor)
        assert len(others) == 2
        assert anchor not in others
        left = [cosine(anchor[0], q) for q, _ in ids.values() if (q, _) not in shown]
        assert min(cosine(anchor[0], q) for q, _ in others) >= max(left) - 1e-3
    assert len(anchors) > len(SEEDS) / 2


def test_a_completion_is_one_question_and_an_unfinished_or_empty_one_is_dropped(finished):
    path, rows, _ = finished
    records = lines(path / "iteration_1" / "instructions", Instruction)
    assert len({r.prompt for r in records}) == len(records)
    assert {r.verdict.reason for r in records} >= {"", "unfinished", "empty"}
    assert all(r.input == "" and r.instruction == r.instruction.strip() for r in records)
    assert rows[1].kept == len(kept(lines(path / "iteration_1" / "responses", Pair)))


def test_any_label_of_the_template_ends_a_question_and_an_answer(finished):
    _, _, backend = finished
    stops = {id.split("/")[1]: stop for model in backend.models for id, stop in model.stops.items()}
    assert stops["synthesize"] == stops["respond"] == ("\n\n### Answer", "\n\n### Question")


def test_no_pair_of_the_pool_is_written_again(finished):
    path, _, _ = finished
    new = [r.instruction for n in (1, 2) for r in kept(lines(path / f"iteration_{n}" / "instructions", Instruction))]
    assert len(set(new)) == len(new) == 40
    assert not set(new) & {seed["question"] for seed in SEEDS}


def test_the_pool_may_be_the_seeds_alone_and_examples_may_be_random(tmp_path):
    _, _ = go(config(tmp_path / "seeds", retrieval=RetrievalConfig(examples=2)))
    shown = lines(tmp_path / "seeds" / "iteration_2" / "examples", ShownExamples)
    assert {id.partition("-")[0] for s in shown for id in s.examples} == {"seed"}
    settings = RetrievalConfig(examples=2, choose="random")
    _, backend = go(config(tmp_path / "random", iterations=1, retrieval=settings))
    drawn = lines(tmp_path / "random" / "iteration_1" / "examples", ShownExamples)
    assert all(len(set(s.examples)) == 2 for s in drawn)
    assert len({s.examples for s in drawn}) > 10
    assert not any("/nearest/" in id for id in prompts_of(backend))


def test_one_of_the_methods_can_go_with_the_other_ways(tmp_path):
    _, backend = go(config(tmp_path / "answers", iterations=1, respond=RespondConfig(rules="basic")))
    assert not (tmp_path / "answers" / "iteration_1" / "examples").exists()
    assert not any("### Answer" in str(p) for id, p in prompts_of(backend).items() if "/respond/" in id)
    settings = SynthesizeConfig(instructions=20, shots=3, seeds=str(tmp_path / "seeds.jsonl"))
    _, backend = go(config(tmp_path / "questions", iterations=1, synthesize=settings), backend=ScriptedBackend())
    assert all("### Answer" in p for id, p in prompts_of(backend).items() if "/respond/" in id)


@pytest.mark.parametrize(("seeds", "count"), [("none", 0), ("added", len(SEEDS)), ("alone", len(SEEDS))])
def test_seeds_can_be_learned_from_too_or_alone(tmp_path, seeds, count):
    _, backend = go(config(tmp_path / "run", iterations=1, sft=SFTConfig(seeds=seeds)))
    examples = backend.calls[0].examples
    found = [(e.conversation[0].content, e.response) for e in examples if e.id.startswith("seed-")]
    assert found == [(s["question"], s["answer"]) for s in SEEDS[:count]]
    assert (len(examples) > count) is (seeds != "alone")
    card = backend.calls[0].card
    assert "each after 3 similar pairs" in card
    assert ("seed tasks alone" in card, "among them the seed tasks" in card) == (seeds == "alone", seeds == "added")


def test_a_seed_without_an_answer_is_refused_before_anything_is_written(tmp_path):
    settings = config(tmp_path / "run")
    (tmp_path / "seeds.jsonl").write_text('{"question": "Who?", "answer": "I."}\n{"question": "Why?"}\n')
    with pytest.raises(UserError, match=r"seeds.jsonl: 1 of 2 tasks have no output, seed-002 first"):
        go(settings)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_template_says_what_ends_a_question_and_an_answer(tmp_path):
    assert stops_of(load("standard", ("retrieved",))) == ("\n\n### Answer", "\n\n### Question")
    (tmp_path / "seeds.jsonl").write_text("")
    (tmp_path / "retrieved.jinja").write_text("{% for e in examples %}{{ e.question }}{{ e.answer }}{% endfor %}")
    with pytest.raises(UserError, match=r"retrieved.jinja should show each example's question, a label"):
        check_template(load(str(tmp_path), ("retrieved",)))


def test_second_turns_need_zero_shot_answers(tmp_path):
    from isheep_jax.config_checks import check_values

    settings = config(tmp_path / "run")
    turns = dataclasses.replace(settings, synthesize=dataclasses.replace(settings.synthesize, turns=2))
    with pytest.raises(UserError, match=r"--synthesize.turns: 2 needs --respond.method=zero_shot"):
        check_values(turns)
