import dataclasses
import json
import re

import pytest
from scripted_backend import (
    ScriptedBackend,
    ScriptedEvaluator,
    ScriptedModel,
    SilentReporter,
    evaluator,
    tiny_config,
)

from isheep_jax.config import AssessConfig, SelectConfig, SFTConfig, SynthesizeConfig
from isheep_jax.errors import UserError
from isheep_jax.files import sealed
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.inputs import read_inputs
from isheep_jax.loop.records import Instruction, Pair, Selected, from_line, kept


def go(config, backend=None, held_out=frozenset()):
    backend, reporter = backend or ScriptedBackend(), SilentReporter()
    rows = run(config, backend, {"fake": evaluator}, held_out, reporter)
    return rows, backend, reporter


def lines(path, cls):
    return [from_line(cls, line) for part in sorted(path.glob("part-*")) for line in part.read_text().splitlines()]


def test_a_run_leaves_the_whole_directory(tmp_path):
    rows, backend, reporter = go(tiny_config(tmp_path / "run"))
    assert [r.iteration for r in rows] == [0, 1, 2]
    assert rows == reporter.rows
    assert rows[0].evaluation["fake"].keys() == {"accuracy", "stderr", "count"}
    assert (rows[1].instructions, rows[1].train_loss) == (30, 1.0)
    place = tmp_path / "run" / "iteration_2"
    assert {p.name for p in place.iterdir()} == {
        *("instructions", "responses", "scores", "selected", "checkpoints", "adapter", "model", "evaluation"),
        *("fine_tune.json", "evaluation.json", "summary.json"),
    }
    assert json.loads((place / "evaluation.json").read_text())["fake"]["count"] == 8
    assert json.loads((place / "summary.json").read_text()) == rows[2].as_dict()
    selected = lines(place / "selected", Selected)
    responses = lines(place / "responses", Pair)
    assert [p.id for p in responses] == [s.id for s in selected]
    unfinished = sum(p.verdict.reason == "unfinished" for p in responses)
    assert unfinished
    assert rows[2].ended == pytest.approx(1 - unfinished / len(responses), abs=1e-3)
    assert [e.id for e in backend.calls[1].examples] == [s.id for s in selected if s.verdict.kept]
    assert all(total == done for _, _, total, _, done in reporter.stages)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_finished_run_asks_nothing_of_the_model(tmp_path):
    rows, _, _ = go(tiny_config(tmp_path))
    again, backend, _ = go(tiny_config(tmp_path))
    assert again == rows
    assert (backend.loaded, backend.calls) == ([], [])


def test_more_iterations_go_on_from_the_last(tmp_path):
    go(tiny_config(tmp_path, iterations=1))
    rows, backend, _ = go(tiny_config(tmp_path, iterations=2))
    assert [c.iteration for c in backend.calls] == [2]
    assert len(rows) == 3


@pytest.mark.parametrize(("warmup", "warned"), [(2, 0), (3, 1), (20, 1)])
def test_a_warm_up_as_long_as_the_training_is_a_warning_with_both_numbers(tmp_path, warmup, warned):
    config = tiny_config(tmp_path, iterations=1, sft=SFTConfig(warmup_steps=warmup))
    _, _, reporter = go(config)
    about = [line for line in reporter.lines if "warmup" in line]
    assert len(about) == warned
    assert all(f"warmup_steps={warmup}" in line and "3 updates" in line for line in about)
    # What is finished is not warned of again.
    assert not [line for line in go(config)[2].lines if "warmup" in line]


def test_training_starts_from_the_base_or_the_previous_model(tmp_path):
    _, backend, _ = go(tiny_config(tmp_path / "base"))
    assert [c.start for c in backend.calls] == [None, None]
    _, backend, _ = go(tiny_config(tmp_path / "previous", sft=SFTConfig(start="previous")))
    assert [c.start for c in backend.calls] == [None, tmp_path / "previous" / "iteration_1" / "model"]


def test_the_judge_is_the_current_or_the_base_model(tmp_path):
    for judge, expected in (("current", "iteration_1"), ("base", None)):
        _, backend, _ = go(tiny_config(tmp_path / judge, assess=AssessConfig(judge=judge)))
        loaded = [
            directory
            for directory, model in zip(backend.loaded, backend.models)
            if any(id.startswith("2/assess/") for id in model.prompts)
        ]
        assert [d.parent.name if d else None for d in loaded] == [expected]


def test_the_base_model_answers_bare_text_and_later_models_a_conversation(tmp_path):
    _, backend, _ = go(tiny_config(tmp_path))
    prompts = {id: p for model in backend.models for id, p in model.prompts.items() if "/respond/" in id}
    assert all(isinstance(p, str) and p.endswith("\n") for id, p in prompts.items() if id.startswith("1/"))
    assert all(isinstance(p, tuple) for id, p in prompts.items() if id.startswith("2/"))


def test_sampled_scores_run_through_and_unscored_pairs_are_dropped(tmp_path):
    config = tiny_config(tmp_path, assess=AssessConfig(read="sampled"), iterations=1)
    _, _, reporter = go(config)
    selected = lines(tmp_path / "iteration_1" / "selected", Selected)
    assert any(s.verdict.reason == "unscored" for s in selected)
    assert any("got no score" in line for line in reporter.lines)


def test_a_held_out_instruction_is_never_learned_from(tmp_path):
    config = tiny_config(tmp_path / "a", iterations=1)
    go(config)
    first = kept(lines(tmp_path / "a" / "iteration_1" / "instructions", Instruction))[0]
    go(tiny_config(tmp_path / "b", iterations=1), held_out=frozenset({first.instruction.upper() + "!"}))
    records = {r.id: r for r in lines(tmp_path / "b" / "iteration_1" / "instructions", Instruction)}
    assert records[first.id].verdict.reason == "in an evaluation set"
    assert records[first.id].instruction == first.instruction


@pytest.mark.parametrize("trained_on", ["none", "added"])
def test_a_seed_in_an_evaluation_set_is_left_out_and_named(tmp_path, trained_on):
    config = tiny_config(tmp_path / "run", iterations=1, sft=SFTConfig(seeds=trained_on))
    config = dataclasses.replace(config, synthesize=dataclasses.replace(config.synthesize, shots=1))
    seeds = read_inputs(config, None).seeds
    _, backend, reporter = go(config, held_out=frozenset({seeds[1].instruction.upper() + "!"}))
    assert any(f"1 of {len(seeds)} tasks" in line and "(seed-002 is the first)" in line for line in reporter.lines)
    learned = [example.id for example in backend.calls[0].examples if example.id.startswith("seed-")]
    assert learned == ([s.id for s in seeds if s.id != "seed-002"] if trained_on == "added" else [])
    prompts = [p for model in backend.models for id, p in model.prompts.items() if "/synthesize/" in id]
    assert not any(seeds[1].instruction in prompt for prompt in prompts)


def test_too_few_seeds_outside_the_evaluation_sets_are_refused(tmp_path):
    config = tiny_config(tmp_path / "run")
    seeds = read_inputs(config, None).seeds
    with pytest.raises(UserError, match=r"evaluate.tasks \(seed-001 is the first\) .* 2 remain, but a prompt shows 3"):
        go(config, held_out=frozenset(f"{s.instruction}\n{s.input}" for s in seeds[:-2]))
    assert not (tmp_path / "run").exists()


def test_instructions_are_new_across_iterations(tmp_path):
    go(tiny_config(tmp_path, synthesize=SynthesizeConfig(instructions=30, shots=3, novelty=1.0)))
    texts = [
        (r.instruction, r.input)
        for n in (1, 2)
        for r in lines(tmp_path / f"iteration_{n}" / "instructions", Instruction)
        if r.verdict.kept
    ]
    assert len(texts) == len(set(texts)) == 60


@pytest.mark.parametrize(("scope", "repeats"), [("run", 0), ("iteration", 10), ("hundred", 10)])
def test_what_an_earlier_iteration_kept_counts_as_the_scope_says(tmp_path, scope, repeats):
    class Same(ScriptedModel):
        def complete(self, request):
            if "/synthesize/" in request.id:
                # In every iteration the same tasks for the same prompt.
                self.name, request = "same", dataclasses.replace(request, id=f"1{request.id[1:]}")
                return dataclasses.replace(super().complete(request), id=f"{self.iteration}{request.id[1:]}")
            return super().complete(request)

    class Backend(ScriptedBackend):
        def model(self, name):
            model = Same(name, self.fuse)
            model.iteration = 1 if name == "base" else 2
            return model

    settings = SynthesizeConfig(instructions=10, shots=3, novelty=1.0, novelty_scope=scope)
    go(tiny_config(tmp_path, synthesize=settings), Backend())
    first, second = (
        {(r.instruction, r.input) for r in kept(lines(tmp_path / f"iteration_{n}" / "instructions", Instruction))}
        for n in (1, 2)
    )
    assert len(first & second) == repeats


def test_a_selection_that_keeps_too_little_stops_and_goes_on_with_a_lower_setting(tmp_path):
    with pytest.raises(UserError, match=r"lower select.threshold \(now 9.9\).*the same command with it goes on") as e:
        go(tiny_config(tmp_path, select=SelectConfig(threshold=9.9)))
    assert "\n" not in str(e.value)
    assert re.search(r"quality: mean \d.\d\d, highest \d.\d\d", str(e.value))
    assert (tmp_path / "iteration_1" / "scores" / "DONE").exists()
    rows, backend, _ = go(tiny_config(tmp_path, select=SelectConfig(threshold=5)))
    assert len(rows) == 3
    base = backend.models[0].prompts if backend.loaded[0] is None else {}
    assert not any("1/assess" in id or "1/respond" in id for id in base)


def test_the_kept_pairs_load_as_a_dataset(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    go(tiny_config(tmp_path, iterations=1))
    source = tfds.builder_from_directory(tmp_path / "iteration_1" / "selected" / "dataset").as_data_source("train")
    pairs = kept(lines(tmp_path / "iteration_1" / "selected", Selected))
    assert [e["id"].decode() for e in source] == [s.id for s in pairs]
    assert [e["response"].decode() for e in source] == [s.response for s in pairs]
    assert source[0]["quality"] == pytest.approx(pairs[0].quality)


def test_the_card_says_how_the_model_came_to_be(tmp_path):
    _, backend, _ = go(tiny_config(tmp_path))
    card = backend.calls[1].card
    assert all(text in card for text in ("iteration 2", "the model of iteration 1", "the best 40%"))


def test_figures_with_other_settings_are_measured_again(tmp_path):
    config = tiny_config(tmp_path / "run")
    rows, _, _ = go(config)
    path = tmp_path / "run" / "iteration_1" / "evaluation.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({"fake": sealed({**results["fake"], "accuracy": 9.0})}))

    class Other(ScriptedEvaluator):
        def is_current(self, result):
            return result["accuracy"] <= 1

    again = run(config, ScriptedBackend(), {"fake": Other(evaluator.accuracy)}, frozenset(), SilentReporter())
    assert again == rows
