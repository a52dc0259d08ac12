"""Every ablation of the paper's tables by one setting, through the whole loop."""

import dataclasses
import json
import re
import shutil

import pytest
from scripted_backend import (
    Fuse,
    Killed,
    ScriptedBackend,
    ScriptedEvaluator,
    ScriptedModel,
    SilentReporter,
    evaluator,
    number,
    tiny_config,
)

from isheep_jax import chat_server
from isheep_jax.config import AssessConfig, GuardConfig, RespondConfig, SelectConfig, SFTConfig, StopConfig
from isheep_jax.config import SynthesizeConfig as Synthesize
from isheep_jax.decode.requests import ChoiceLogprobs
from isheep_jax.errors import UserError
from isheep_jax.files import write_json
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import Scores, Selected, Vector, from_line, kept
from isheep_jax.runtime.locate import locate_judge


def go(config, backend=None, measure=evaluator, reporter=None):
    backend = backend or ScriptedBackend()
    backend.judge = locate_judge(config)
    rows = run(config, backend, {"fake": measure}, frozenset(), reporter or SilentReporter())
    return rows, backend


def lines(path, cls):
    return [from_line(cls, line) for part in sorted(path.glob("part-*")) for line in part.read_text().splitlines()]


def asked(backend, word):
    """Ids of the requests whose id has the word, with the directory of the model that they went to."""
    return {
        id: directory
        for directory, model in zip(backend.loaded, backend.models, strict=True)
        for id in model.prompts
        if word in id
    }


@pytest.mark.parametrize("start", ["base", "previous"])
@pytest.mark.parametrize("data", ["iteration", "all"])
def test_iterative_settings_are_the_start_times_the_data(tmp_path, start, data):
    """One_base, One_last, Total_base and Total_last."""
    rows, backend = go(tiny_config(tmp_path, sft=SFTConfig(start=start, data=data)))
    last = tmp_path / "iteration_1" / "model" if start == "previous" else None
    assert [c.start for c in backend.calls] == [None, last]
    first, second = ({e.id[0] for e in call.examples} for call in backend.calls)
    assert first == {"1"}
    assert second == ({"2"} if data == "iteration" else {"1", "2"})
    assert len(backend.calls[1].examples) == rows[2].kept + (rows[1].kept if data == "all" else 0)
    assert ("of all iterations so far" in backend.calls[1].card) is (data == "all")


@pytest.mark.parametrize(
    ("level", "prompt", "criteria"),
    [
        ("both", "standard", {"quality", "following"}),
        ("quality", "simple", {"quality"}),
        ("following", "standard", {"following"}),
        ("both", "joint", {"quality"}),
        ("both", "few_shot", {"quality"}),
        ("both", "simple", {"quality", "following"}),
    ],
)
def test_only_what_the_level_and_the_prompt_ask_for_is_computed(tmp_path, level, prompt, criteria):
    rows, backend = go(tiny_config(tmp_path, iterations=1, assess=AssessConfig(level=level, prompt=prompt)))
    assert {id.split("/")[2] for id in asked(backend, "/assess/")} == criteria
    assert (rows[1].mean_quality is not None) is ("quality" in criteria)
    assert (rows[1].mean_following is not None) is ("following" in criteria)
    selected = lines(tmp_path / "iteration_1" / "selected", Selected)
    passed = {s.instruction_id for s in selected if s.verdict.kept or s.verdict.reason != "unfinished"}
    assert len(kept(selected)) == round(0.4 * len(passed))


def test_without_readings_nothing_is_asked_and_all_that_passed_the_rules_is_kept(tmp_path):
    rows, backend = go(tiny_config(tmp_path, iterations=1, assess=AssessConfig(readings=())))
    assert asked(backend, "/assess/") == {}
    selected = lines(tmp_path / "iteration_1" / "selected", Selected)
    assert len(kept(selected)) == len({s.instruction_id for s in selected if s.verdict.reason != "unfinished"})
    assert rows[1].mean_quality is rows[1].mean_following is None


@pytest.mark.parametrize(
    ("assess", "respond", "conversations"),
    [
        ({}, {}, {"1": False, "2": True}),
        ({"judge": "base"}, {}, {"1": False, "2": False}),
        ({"judge": "base"}, {"base_prompt": "chat"}, {"1": True, "2": True}),
        ({"framing": "text"}, {"base_prompt": "chat"}, {"1": False, "2": False}),
        ({"framing": "chat"}, {}, {"1": True, "2": True}),
    ],
)
def test_the_judge_is_asked_as_the_model_is_used_to(tmp_path, assess, respond, conversations):
    _, backend = go(tiny_config(tmp_path, assess=AssessConfig(**assess), respond=RespondConfig(**respond)))
    prompts = {id: p for model in backend.models for id, p in model.prompts.items() if "/assess/" in id}
    assert {id[0]: isinstance(prompt, tuple) for id, prompt in prompts.items()} == conversations
    for prompt in prompts.values():
        if isinstance(prompt, tuple):
            assert [message.role for message in prompt] == ["user", "assistant"]


@pytest.mark.parametrize("framing", ["text", "chat"])
def test_the_lift_is_over_the_prompt_without_the_instruction_as_the_judge_is_asked(tmp_path, framing):
    _, backend = go(tiny_config(tmp_path, assess=AssessConfig(readings=("lift",), framing=framing)))
    prompts = {id: p for model in backend.models for id, p in model.prompts.items() if "/lift/" in id}
    for id, prompt in prompts.items():
        # Without an instruction only the form of the prompt is left.
        given = prompts[id.replace("/empty/", "/given/")]
        if id.startswith("1/") and framing == "text":
            assert given.endswith("\n")
            assert "/empty/" not in id or prompt == "\n"
        else:
            assert [message.role for message in given] == ["user"]
            assert "/empty/" not in id or prompt[0].content == ""


@pytest.mark.parametrize("readings", [("lift",), ("self_consistency", "rubric", "pairwise")])
def test_any_readings_choose_the_pairs(tmp_path, readings):
    config = tiny_config(tmp_path, assess=AssessConfig(readings=readings, agreement=7))
    rows, backend = go(config)
    scores = {s.id: s for s in lines(tmp_path / "iteration_1" / "scores", Scores)}
    assert all(set(s.readings) == set(readings) - {"rubric"} for s in scores.values())
    selected = lines(tmp_path / "iteration_1" / "selected", Selected)
    left_out = {s.instruction_id for s in selected if s.rank is not None}
    assert rows[1].kept == len(kept(selected)) == round(0.4 * len(left_out))
    assert set(rows[1].readings) == set(readings)
    assert all(means["kept"] > means["mean"] for means in list(rows[1].readings.values())[:1])
    assert (rows[1].mean_quality is not None) is ("rubric" in readings)
    assert rows[2].agreement["pairs"] == 7
    assert ("difference" in rows[2].agreement) is ("rubric" in readings)
    assert "likelier" in backend.calls[0].card or "rubric" in readings


def test_several_judgments_are_asked_for_and_their_mean_counts(tmp_path):
    config = tiny_config(tmp_path, iterations=1, assess=AssessConfig(read="sampled", samples=3, level="quality"))
    _, backend = go(config)
    scores = lines(tmp_path / "iteration_1" / "scores", Scores)
    assert len(asked(backend, "/assess/")) == 3 * len(scores)
    assert {round(s.quality.value * 6) for s in scores if s.quality.value} >= {42, 54, 48}


def test_the_judge_may_be_the_previous_model(tmp_path):
    _, backend = go(tiny_config(tmp_path, iterations=3, assess=AssessConfig(judge="previous")))
    judges = {id[0]: d and d.parent.name for id, d in asked(backend, "/assess/").items()}
    assert judges == {"1": None, "2": None, "3": "iteration_1"}


def foreign(path, name="judge"):
    (path / name).mkdir()
    (path / name / "config.json").write_text("{}")
    (path / name / "weights.json").write_text(name)
    return str(path / name)


def test_the_judge_may_be_another_model(tmp_path):
    config = tiny_config(tmp_path / "run", assess=AssessConfig(judge=foreign(tmp_path)))
    _, backend = go(config)
    assert {str(d) for d in asked(backend, "/assess/").values()} == {str(tmp_path / "judge")}
    assert str(tmp_path / "judge") not in {str(d) for d in asked(backend, "/respond/").values()}
    assert "scores of another model" in " ".join(backend.calls[0].card.split())
    with pytest.raises(UserError, match=r"assess\.judge was"):
        go(dataclasses.replace(config, assess=AssessConfig(judge=foreign(tmp_path, "other"))))


def test_a_judge_that_has_become_another_one_is_refused_once_it_has_scored(tmp_path):
    other = tmp_path / "other"
    for n in (0, 1, 2):
        (other / f"iteration_{n}" / "model").mkdir(parents=True)
    for n in (1, 2):
        (other / f"iteration_{n}" / "model" / "weights.json").write_text(str(n))
        (other / f"iteration_{n}" / "model" / "config.json").write_text("{}")
    write_json(other / "iteration_1" / "fine_tune.json", {"metrics": {}})
    config = tiny_config(tmp_path / "run", iterations=1, assess=AssessConfig(judge=str(other)))
    with pytest.raises(Killed):
        go(config, ScriptedBackend(Fuse(3)))
    write_json(other / "iteration_2" / "fine_tune.json", {"metrics": {}})
    _, backend = go(config)
    assert set(asked(backend, "/assess/").values()) == {other / "iteration_2" / "model"}
    (other / "iteration_2" / "fine_tune.json").unlink()
    with pytest.raises(UserError, match=r"made with other files: assess\.judge changed"):
        go(config)


def test_the_judge_may_be_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_server.ChatServer, "_post", lambda self, body: answer(json.loads(body)))
    settings = AssessConfig(judge="http://localhost:1/v1", judge_model="big-judge", read="sampled")
    _, backend = go(tiny_config(tmp_path, iterations=1, assess=settings))
    assert asked(backend, "/assess/") == {}
    scores = lines(tmp_path / "iteration_1" / "scores", Scores)
    assert {s.quality.value for s in scores} == {3.0, 9.0}
    assert "big-judge" in backend.calls[0].card


def answer(body):
    prompt = body["messages"][-1]["content"]
    text = f"{9 if number(prompt).random() < 0.5 else 3}||so {body['model']}"
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.mark.parametrize("judge", ["current", "base"])
def test_how_far_base_and_current_judge_agree_is_in_the_summary(tmp_path, judge):
    config = tiny_config(tmp_path, assess=AssessConfig(judge=judge, agreement=7))
    rows, backend = go(config)
    # In the first iteration they are one model.
    assert rows[1].agreement is None
    assert rows[2].agreement.keys() == {"pairs", "correlation", "difference", "same_verdict"}
    assert rows[2].agreement["pairs"] == 7
    assert json.loads((tmp_path / "iteration_2" / "summary.json").read_text()) == rows[2].as_dict()
    others = lines(tmp_path / "iteration_2" / "agreement", Scores)
    scores = {s.id: s for s in lines(tmp_path / "iteration_2" / "scores", Scores)}
    assert all(scores[o.id].quality.value != o.quality.value for o in others)
    assert go(tiny_config(tmp_path / "off"))[0][2].agreement is None
    assert go(config, backend := ScriptedBackend())[0] == rows
    assert backend.loaded == []


@pytest.mark.parametrize(
    ("rule", "stages"),
    [
        ("threshold", set()),
        ("random_threshold", set()),
        ("perplexity", set()),
        ("density", {"vectors"}),
        ("density_perplexity", {"vectors"}),
        ("none", set()),
    ],
)
def test_every_filter_computes_what_it_looks_at_and_no_more(tmp_path, rule, stages):
    readings = ("likelihood",) if "perplexity" in rule else ("rubric",)
    select = SelectConfig(rule=rule, threshold=6, clusters=8)
    config = tiny_config(tmp_path, iterations=1, select=select, assess=AssessConfig(readings=readings))
    rows, _ = go(config)
    place = tmp_path / "iteration_1"
    assert {p.name for p in place.iterdir() if p.is_dir()} - stages == {
        *("instructions", "responses", "scores", "selected", "checkpoints", "adapter", "model", "evaluation"),
    }
    assert all((place / stage / "DONE").exists() for stage in stages)
    selected = lines(place / "selected", Selected)
    if "vectors" in stages:
        assert rows[1].kept == len({s.cluster for s in kept(selected)}) == 8
        assert len(lines(place / "vectors", Vector)) == len(
            {s.instruction_id for s in selected if s.cluster is not None}
        )
    if "perplexity" in rule:
        assert all(s.perplexity >= 1 for s in kept(selected))


def test_perplexity_is_of_the_response_after_what_was_answered(tmp_path):
    config = tiny_config(
        tmp_path,
        select=SelectConfig(rule="perplexity"),
        respond=RespondConfig(base_prompt="bare", samples=2),
        assess=AssessConfig(readings=("likelihood",)),
    )
    _, backend = go(config)
    prompts = {id: p for model in backend.models for id, p in model.prompts.items()}
    measured = [id for id in prompts if "/likelihood/" in id]
    assert {id[0] for id in measured} == {"1", "2"}
    for id in measured:
        instruction, _, sample = id.rsplit("/", 1)[1].rpartition("-")
        assert prompts[id] == prompts[f"{id[0]}/respond/{instruction}/{sample}"]


def test_a_guard_that_stops_leaves_a_run_that_goes_on(tmp_path):
    config = tiny_config(tmp_path, guard=GuardConfig(judge="off", action="stop", min_yield=0.9))
    with pytest.raises(UserError, match=r"1: only 0.\d+ of .*; raise select.fraction .* lower guard.min_yield"):
        go(config)
    assert (tmp_path / "iteration_1" / "scores" / "DONE").exists()
    # Settings of the selection may change as long as it has not begun.
    changed = dataclasses.replace(config, select=dataclasses.replace(config.select, fraction=0.5))
    with pytest.raises(UserError, match=r"lower guard\.min_yield"):
        go(changed)
    rows, backend = go(dataclasses.replace(changed, guard=GuardConfig(judge="off")))
    assert len(rows) == 3
    assert not any(id.startswith("1/") for id in asked(backend, "/assess/"))


@pytest.mark.parametrize("action", ["warn", "stop", "off"])
def test_a_judge_that_does_not_want_to_score_is_seen(tmp_path, monkeypatch, action):
    def shy(self, requests, choices):
        return (ChoiceLogprobs(r.id, tuple(-9.0 - n for n in range(10))) for r in requests)

    monkeypatch.setattr(ScriptedModel, "choice_logprobs", shy)
    reporter = SilentReporter()
    config = tiny_config(tmp_path, iterations=1, guard=GuardConfig(judge="off", action=action))
    if action == "stop":
        with pytest.raises(UserError, match=r"median probability of only 0\.000"):
            go(config, reporter=reporter)
        config = dataclasses.replace(config, guard=GuardConfig(judge="off", action="stop", min_score_mass=0.0))
    rows, _ = go(config, reporter=reporter)
    assert rows[1].score_mass < 0.001
    assert any("median probability" in line for line in reporter.lines) is (action == "warn")


def test_an_iteration_that_repeats_itself_is_seen(tmp_path):
    # The scripted model writes much that is near to something else.
    synthesize = Synthesize(instructions=30, shots=3, novelty=0.6)
    reporter = SilentReporter()
    config = tiny_config(
        tmp_path, iterations=1, synthesize=synthesize, guard=GuardConfig(judge="off", min_novelty=0.99)
    )
    rows, _ = go(config, reporter=reporter)
    assert 0 < rows[1].novelty < 0.99
    assert any(f"only {rows[1].novelty:.3f} of the well-formed" in line for line in reporter.lines)


def falling_after(best):
    """An evaluator whose accuracy rises up to the model of that iteration and falls after it."""
    seen = []

    def accuracy(model):
        seen.append(model)
        return 0.5 - 0.1 * abs(len(seen) - 1 - best)

    return ScriptedEvaluator(accuracy)


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 4)])
def test_the_run_ends_when_the_measure_rises_no_more_and_marks_the_best(tmp_path, patience, last):
    stop = StopConfig(measure="accuracy", patience=patience)
    reporter = SilentReporter()
    measure = falling_after(2)
    rows, _ = go(tiny_config(tmp_path, iterations=5, stop=stop), measure=measure, reporter=reporter)
    assert rows[-1].iteration == last
    assert json.loads((tmp_path / "best.json").read_text()) == {"iteration": 2, "measure": "accuracy", "value": 0.5}
    assert reporter.lines[-2:] == [
        f"iteration {last} is the last: accuracy has not improved (--stop.patience)",
        "best: iteration 2, accuracy 0.500",
    ]
    # The same command changes nothing; with more patience the run goes on.
    again, backend = go(tiny_config(tmp_path, iterations=5, stop=stop), measure=measure)
    assert again == rows
    assert backend.loaded == []
    more, _ = go(tiny_config(tmp_path, iterations=5, stop=StopConfig("accuracy", 9)), measure=measure)
    assert more[-1].iteration == 5


def test_by_the_validation_loss_too(tmp_path):
    class Losing(ScriptedBackend):
        def fine_tune(self, job, progress):
            loss = [None, 1.0, 0.5, 0.7, 0.4][job.iteration]
            return super().fine_tune(job, progress) | {"validation_loss": loss}

    config = tiny_config(tmp_path, iterations=4, stop=StopConfig("validation_loss"))
    rows = run(config, Losing(), {}, frozenset(), SilentReporter())
    assert rows[-1].iteration == 3
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"iteration": 2, "measure": "validation_loss", "value": 0.5}


def test_a_wording_that_the_templates_lack_is_named_before_anything_is_written(tmp_path):
    shutil.copytree(load("standard").directory, tmp_path / "prompts")
    (tmp_path / "prompts" / "few_shot.jinja").unlink()
    config = tiny_config(tmp_path / "run", prompts=str(tmp_path / "prompts"), assess=AssessConfig(prompt="few_shot"))
    with pytest.raises(UserError, match=r"prompts: .* has no few_shot.jinja"):
        go(config)
    assert not (tmp_path / "run").exists()


def test_the_wording_may_change_until_the_first_score(tmp_path):
    with pytest.raises(Killed):
        go(tiny_config(tmp_path), ScriptedBackend(Fuse(4)))
    config = tiny_config(tmp_path, assess=AssessConfig(prompt="joint"))
    rows, _ = go(config)
    assert rows[1].mean_following is None
    assert "prompts/joint.jinja" in json.loads((tmp_path / "inputs.json").read_text())
    with pytest.raises(UserError, match=re.escape('assess.prompt was "joint", now "standard"')):
        go(tiny_config(tmp_path))
