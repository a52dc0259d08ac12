"""Verbose cloning, and the whole of SELF-ALIGN: what is learned, what is written where, and that it resumes."""

import dataclasses
import json

import pytest
from scripted_backend import (
    Fuse,
    ScriptedBackend,
    ScriptedModel,
    SilentReporter,
    context_of,
    evaluator,
    number,
    tiny_config,
)

from isheep_jax.config import CloneConfig, Config, RespondConfig, SelectConfig, SFTConfig
from isheep_jax.config_checks import check_together
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import NothingLeftError, UserError
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.card import Step, lineage_card
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import KEPT, Instruction, Pair, from_line, kept
from isheep_jax.loop.stages.clone import answer_thoroughly, echo_reason
from isheep_jax.named_configs import named_config
from isheep_jax.presets import PRESETS

SECRET = "Rules that matter: 2, 5"
TEMPLATES = load("standard", ("synthesize", "thorough"))
HEAD = TEMPLATES.prefix("thorough")
TASK = Instruction("1-000000", "Explain why the sea is so salt.", "", 0, (), KEPT)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Explain why the sea is so salt. Because of rivers.", "repeats the instruction"),
        ("Explaining why the sea is so salt takes a while.", None),
        ("I was asked: explain why the sea is so salt.", None),
        (
            "You stay with the subject, do not repeat yourself, and say openly what you do not know. Salt.",
            "repeats the prompt",
        ),
        ("You stay with the subject, and say openly what you do not know. Salt.", None),
    ],
)
def test_an_answer_that_repeats_what_was_shown_is_dropped(answer, reason):
    assert echo_reason(TASK, HEAD, answer) == reason


def test_a_short_instruction_may_open_its_answer():
    short = dataclasses.replace(TASK, instruction="Name some salt.")
    assert echo_reason(short, HEAD, "Name some salt: sodium chloride.") is None


class Says(ScriptedModel):
    def __init__(self, *completions):
        super().__init__("says", Fuse())
        self.completions = completions

    def complete(self, request):
        text, finish = self.completions[int(request.id.rsplit("/", 1)[1])]
        return Completion(request.id, text, finish_reason=finish, error="too long")


def answered(tmp_path, *completions):
    config = tiny_config(tmp_path, respond=RespondConfig(rules="basic"), clone=CloneConfig(enabled=True))
    tasks = [dataclasses.replace(TASK, id=str(n), input="Briefly.") for n in range(len(completions))]
    model = Says(*completions)
    return answer_thoroughly(context_of(config, templates=TEMPLATES), model, tasks), model


def test_each_answer_says_why_it_is_dropped_and_repetition_is_cut(tmp_path):
    pairs, model = answered(
        tmp_path,
        (" Rivers bring the salt. ", "stop"),
        ("Rivers bring the", "length"),
        ("", "error"),
        (" ", "stop"),
        ("It comes from the rivers. Yes. It comes from the rivers. Yes.", "stop"),
    )
    assert [p.verdict.reason for p in pairs] == ["", "unfinished", "not decoded", "empty", ""]
    assert [p.response for p in kept(pairs)] == ["Rivers bring the salt.", "It comes from the rivers. Yes."]
    assert pairs[0].id == "0-thorough"
    (message,) = model.prompts["1/clone/0"]
    assert message.content == f"{HEAD}Explain why the sea is so salt.\nBriefly."


def test_too_few_answers_end_the_run_in_one_line(tmp_path):
    with pytest.raises(
        NothingLeftError, match=r"clone: 0 of 1 thorough answers are kept, select\.min_pairs asks for 1;"
    ) as e:
        answered(tmp_path, (" ", "stop"))
    assert "\n" not in str(e.value)


def self_aligned(path, **changes) -> Config:
    small = tiny_config(path)
    config = dataclasses.replace(PRESETS["self_align"].apply(small), iterations=2)
    synthesize = dataclasses.replace(config.synthesize, topic_share=0.4)
    return dataclasses.replace(config, **{"synthesize": synthesize, **changes})


@pytest.fixture(autouse=True)
def _writes_thoughts(monkeypatch):
    plain = ScriptedModel.complete

    def complete(model, request):
        rng = number(model.name, request.id)
        if "/respond/" in request.id:
            answer = f"It is {rng.randint(0, 9**9)} because of many reasons. " + "So. " * 40
            thoughts = f" Thinking {rng.random()}. {SECRET}." if rng.random() < 0.8 else ""
            return Completion(request.id, f"{thoughts}\nAnswer: {answer}")
        if "/clone/" in request.id:
            return Completion(
                request.id, f"At length: {rng.randint(0, 9**9)}.", finish_reason=rng.choice(["stop", "length"])
            )
        return plain(model, request)

    monkeypatch.setattr(ScriptedModel, "complete", complete)


def go(config, backend=None):
    backend = backend or ScriptedBackend()
    return run(config, backend, {"fake": evaluator}, frozenset(), SilentReporter()), backend


def lines(path, cls):
    return [from_line(cls, line) for part in sorted(path.glob("part-*")) for line in part.read_text().splitlines()]


def test_self_align_learns_bare_answers_first_and_thorough_ones_then(tmp_path):
    rows, backend = go(self_aligned(tmp_path))
    place = tmp_path / "iteration_2"
    names = {"topics", "instructions", "responses", "scores", "selected", "engraved", "thorough"}
    assert names <= {p.name for p in place.iterdir()}
    assert {p.name for p in (place / "engraved").iterdir()} >= {"model", "fine_tune.json", "evaluation.json"}
    engraving, cloning = backend.calls[2:]
    assert (engraving.start, cloning.start) == (None, None)
    # Every answer that passed the filters is learned: no score, no selection.
    pairs = lines(place / "responses", Pair)
    assert [e.response for e in engraving.examples] == [p.response for p in kept(pairs)]
    assert {p.verdict.reason for p in pairs} == {"", "no thoughts"}
    instructions = kept(lines(place / "instructions", Instruction))
    assert any(x.hint for x in instructions)
    assert any(x.hint is None for x in instructions)
    thorough = lines(place / "thorough", Pair)
    assert [p.instruction_id for p in thorough] == [x.id for x in instructions]
    assert [e.response for e in cloning.examples] == [p.response for p in kept(thorough)]
    assert [e.conversation[0].content for e in cloning.examples] == [
        f"{p.instruction}\n{p.input}".strip() for p in kept(thorough)
    ]
    assert rows[2].thorough == len(kept(thorough)) > 0
    assert rows[2].engraved["fake"].keys() == {"accuracy", "stderr", "count"}
    assert "thorough answers by a model" in cloning.card
    assert "thorough answers by a model" not in engraving.card
    assert all("which no score\nchose" in call.card for call in backend.calls)


def test_neither_principles_nor_thoughts_are_in_what_is_trained_on(tmp_path):
    _, backend = go(self_aligned(tmp_path))
    shown = [p for m in backend.models for id, p in m.prompts.items() if "/respond/" in id]
    assert all("Ethical:" in p for p in shown)
    thoughts = [p.thoughts for p in lines(tmp_path / "iteration_1" / "responses", Pair) if p.verdict.kept]
    assert all(SECRET in t for t in thoughts)
    for call in backend.calls:
        for example in call.examples:
            text = "\n".join([*(m.content for m in example.conversation), example.response])
            assert not any(word in text for word in ("Thinking", "Rules that matter", "Ethical", "Answer:", "thorough"))
    for path in (tmp_path / "iteration_1" / "selected").glob("part-*"):
        assert SECRET not in path.read_text()


def test_the_engraved_model_writes_the_answer_thoroughly_and_the_last_one_goes_on(tmp_path):
    _, backend = go(self_aligned(tmp_path))
    wrote = {
        id.rpartition("/")[0]: directory and directory.relative_to(tmp_path)
        for directory, model in zip(backend.loaded, backend.models, strict=True)
        for id in model.prompts
        if "/clone/" in id or "/respond/" in id
    }
    by_stage = {"/".join(key.split("/")[:2]): str(directory) for key, directory in wrote.items()}
    assert by_stage == {
        "1/respond": "None",
        "1/clone": "iteration_1/engraved/model",
        "2/respond": "iteration_1/model",
        "2/clone": "iteration_2/engraved/model",
    }


@pytest.mark.parametrize("lists", [True, False])
def test_a_model_that_lists_no_topics_is_seen(tmp_path, monkeypatch, lists):
    complete = ScriptedModel.complete

    def silent(model, request):
        return Completion(request.id, "nothing here") if "/topics/" in request.id else complete(model, request)

    if not lists:
        monkeypatch.setattr(ScriptedModel, "complete", silent)
    reporter = SilentReporter()
    run(self_aligned(tmp_path, iterations=1), ScriptedBackend(), {"fake": evaluator}, frozenset(), reporter)
    found = [line for line in reporter.lines if "instructions are about topics" in line]
    assert [line.partition(";")[0] for line in found] == (
        [] if lists else ["iteration 1: 0 of 12 instructions are about topics"]
    )
    manifest = json.loads((tmp_path / "iteration_1" / "instructions" / "DONE").read_text())
    assert manifest["counts"]["from topics"] == (12 if lists else 0)


def test_the_card_of_an_export_says_what_was_trained_on(tmp_path):
    go(self_aligned(tmp_path, iterations=1))
    settings = json.loads((tmp_path / "config.json").read_text())
    card = lineage_card(settings, "", {}, [Step(0), Step(1)], adapter=False)
    assert "rules of good answers, which were not trained on" in card
    assert "thorough answers, written by a model that had been fine-tuned" in card
    plain = {**settings, "clone": {"enabled": False}, "respond": {"method": "zero_shot"}}
    card = lineage_card(plain, "", {}, [Step(0), Step(1)], adapter=False)
    assert "thorough" not in card
    assert "rules of good answers" not in card


@pytest.mark.parametrize("config", [Config(), named_config("tiny")])
def test_the_preset_laid_over_itself_changes_nothing(config):
    once = PRESETS["self_align"].apply(config)
    assert PRESETS["self_align"].apply(once) == once


def test_answer_thoroughly_of_all_iterations_are_learned_where_all_data_is(tmp_path):
    rows, backend = go(self_aligned(tmp_path, sft=SFTConfig(data="all")))
    counts = [len(call.examples) for call in backend.calls]
    kept_counts = [rows[1].kept, rows[2].kept]
    thorough = [rows[1].thorough, rows[2].thorough]
    assert counts == [kept_counts[0], thorough[0], sum(kept_counts), sum(thorough)]


def test_cloning_may_be_chosen_until_the_first_fine_tuning(tmp_path):
    config = self_aligned(tmp_path, clone=CloneConfig(enabled=False), select=SelectConfig(rule="none", min_pairs=99))
    with pytest.raises(NothingLeftError, match=r"lower select\.min_pairs"):
        go(config)
    config = dataclasses.replace(config, select=SelectConfig(rule="none"), clone=CloneConfig(enabled=True))
    rows, _ = go(config)
    assert rows[1].thorough > 0
    with pytest.raises(UserError, match=r"clone\.enabled was true, now false"):
        go(dataclasses.replace(config, clone=CloneConfig(enabled=False)))
    inputs = json.loads((tmp_path / "inputs.json").read_text())
    assert {"prompts/principles.json", "prompts/thorough.jinja", "prompts/topics.jsonl"} <= inputs.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"respond": RespondConfig(method="principles")}, "--synthesize.turns: 2 needs --respond.method=zero_shot"),
        ({"clone": CloneConfig(enabled=True)}, "--synthesize.turns: 2 needs --clone.enabled=False"),
    ],
)
def test_second_turns_do_not_go_with_self_align(settings, message):
    config = Config(**settings)
    check_together(config)
    with pytest.raises(UserError, match=message):
        check_together(dataclasses.replace(config, synthesize=dataclasses.replace(config.synthesize, turns=2)))
