"""Runs that share stages are the runs that they would be alone, and share all and only what is the same."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_backend import Fuse, Killed, ScriptedBackend, SilentReporter, evaluator, snapshot, tiny_config

from isheep_jax.config import Config, EvaluateConfig
from isheep_jax.presets import replace_settings
from isheep_jax.studies import runs, sharing

LIKELIHOOD = {"assess.readings": ("likelihood",)}
RETRIEVED = {"respond.method": "retrieved"}
# Settings of a first and a second row, and the number of fine-tunings that the second still needs.
PAIRS = {
    "selection": ({}, {"select.rule": "random"}, 2),
    "reading": ({}, {"assess.read": "sampled"}, 2),
    "responses": ({}, {"respond.samples": 1}, 2),
    "instructions": ({}, {"synthesize.shots": 2}, 2),
    "training": ({}, {"sft.epochs": 3}, 2),
    "start": ({}, {"sft.start": "previous"}, 1),
    "data": ({"sft.start": "previous"}, {"sft.data": "all"}, 1),
    "judge": ({}, {"assess.judge": "base"}, 1),
    "judge before": ({"assess.judge": "base"}, {"assess.judge": "previous"}, 0),
    "second temperature": ({}, {"respond.temperature": (1.0, 0.3)}, 1),
    "one iteration": ({}, {"iterations": 1}, 0),
    "clusters": ({}, {"select.rule": "density", "select.clusters": 8}, 2),
    "clusters and perplexity": (
        {"select.rule": "perplexity", **LIKELIHOOD},
        {"select.rule": "density_perplexity", "select.clusters": 8, **LIKELIHOOD},
        2,
    ),
    "readings": ({}, {"assess.readings": ("lift", "self_consistency")}, 2),
    "second turn": ({"synthesize.turns": 2}, {"synthesize.turns": 2, "sft.epochs": 3}, 2),
    "cloning": ({"clone.enabled": True}, {"clone.enabled": True, "sft.epochs": 3}, 4),
    "cloning, start": ({"clone.enabled": True}, {"clone.enabled": True, "sft.start": "previous"}, 2),
    "pool": (RETRIEVED, {**RETRIEVED, "retrieval.pool": "seeds_and_kept"}, 1),
    "choice": (RETRIEVED, {**RETRIEVED, "retrieval.choose": "random"}, 2),
    "second judge": ({}, {"assess.agreement": 6}, 0),
    "no second judge": ({"assess.agreement": 6}, {}, 0),
    "judge with a second": ({"assess.agreement": 6}, {"assess.agreement": 6, "assess.judge": "base"}, 1),
    "other second judge": (
        {"assess.agreement": 6, "assess.judge": "base"},
        {"assess.agreement": 6, "assess.judge": "previous"},
        0,
    ),
}


QUICK = (
    *("start", "data", "judge before", "second temperature"),
    *("second turn", "cloning, start", "pool", "other second judge"),
)


class Bench:
    """A run factory on the scripted model; keeps its backends."""

    def __init__(self, fuse: Fuse | None = None):
        self.backends: list[ScriptedBackend] = []
        self.factory = runs.RunFactory(
            lambda config: self.backend(fuse),
            lambda *_: {"fake": evaluator},
            lambda config: frozenset(),
            SilentReporter,
        )

    def backend(self, fuse: Fuse | None) -> ScriptedBackend:
        self.backends.append(ScriptedBackend(fuse))
        return self.backends[-1]

    def run(self, config: Config) -> runs.Result:
        return runs.run_or_resume(config, self.factory)


def run_config(root: Path, changes: dict, seed: int = 1, base: str = "models/base") -> Config:
    named = tiny_config(root)
    return runs.with_run_directory(replace_settings(named, changes), named, base, seed)


def records(config: Config) -> dict[str, bytes]:
    """The run's files; config.json holds its place."""
    return {name: data for name, data in snapshot(Path(config.directory)).items() if name != "config.json"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PAIRS]
)
def test_a_run_that_shares_is_the_run_that_it_would_be_alone(tmp_path, name):
    first, second, trainings = PAIRS[name]
    alone = run_config(tmp_path / "alone", second)
    assert Bench().run(alone).shared == ()
    bench = Bench()
    bench.run(run_config(tmp_path / "beside", first))
    beside = run_config(tmp_path / "beside", second)
    result = bench.run(beside)
    assert "0/evaluation" in result.shared
    assert len(bench.backends[1].calls) == trainings
    assert records(beside) == records(alone)


def shared(tmp_path: Path, first: dict, second: dict) -> tuple[str, ...]:
    bench = Bench()
    bench.run(run_config(tmp_path, first))
    return bench.run(run_config(tmp_path, second)).shared


def test_rows_share_as_far_as_their_settings_agree(tmp_path):
    records = [f"1/{stage}" for stage in ("instructions", "responses", "scores")]
    cases = {
        "synthesize.shots": (2, []),
        "respond.samples": (1, records[:1]),
        "assess.read": ("sampled", records[:2]),
        "select.fraction": (0.5, records),
    }
    for setting, (value, expected) in cases.items():
        assert sorted(shared(tmp_path / setting, {}, {setting: value})) == ["0/evaluation", *expected]
    # Where training starts makes no difference before the model of iteration 2.
    iterations = [f"{n}/{stage}" for n in (1, 2) for stage in ("instructions", "responses", "scores", "selected")]
    whole = shared(tmp_path / "start", {}, {"sft.start": "previous"})
    assert sorted(whole) == sorted(["0/evaluation", "1/evaluation", "1/model", *iterations])


def test_nothing_is_shared_across_seeds_bases_files_and_versions(tmp_path, monkeypatch):
    bench = Bench()
    bench.run(run_config(tmp_path, {}))
    assert bench.run(run_config(tmp_path, {}, seed=2)).shared == ()
    assert bench.run(run_config(tmp_path, {}, base="models/other")).shared == ()
    assert bench.run(run_config(tmp_path, {}, base="elsewhere/base")).shared == ()
    seeds = tmp_path / "seeds.jsonl"
    for i, text in enumerate(("Name a bird.", "Name a fish.")):
        lines = [f'{{"instruction": "{text} {n}", "input": "", "output": "x"}}' for n in range(4)]
        seeds.write_text("\n".join(lines))
        changes = {"synthesize.seeds": str(seeds), "sft.epochs": i + 1}
        assert not [name for name in bench.run(run_config(tmp_path, changes)).shared if name.startswith("1/")]
    monkeypatch.setattr(runs, "environment", lambda: {"packages": {"jax": "next"}})
    assert bench.run(run_config(tmp_path, {"select.fraction": 0.5})).shared == ()


def test_other_measurements_share_the_models_but_not_the_figures(tmp_path):
    bench = Bench()
    first = run_config(tmp_path, {})
    bench.run(first)
    second = replace(
        first, evaluate=EvaluateConfig(limit=7), workdir=str(Path(first.workdir).parent.parent / "x" / "1")
    )
    result = bench.run(second)
    assert "1/model" in result.shared
    assert not [name for name in result.shared if "evaluation" in name]


def test_equal_settings_are_one_run_that_is_made_once(tmp_path):
    bench = Bench()
    first = bench.run(run_config(tmp_path, {"select.rule": "random"}))
    again = bench.run(run_config(tmp_path, {"select.rule": "random", "mesh.data": 2}))
    assert len(bench.backends) == 1
    assert (first.evaluations, first.rows) == (again.evaluations, again.rows)
    assert first.seconds is not None
    assert again.seconds is None


def test_training_states_of_finished_runs_are_not_kept(tmp_path):
    config = run_config(tmp_path, {})
    Bench().run(config)
    assert not list(Path(config.directory).rglob("checkpoints"))
    assert list(Path(config.directory).rglob("weights.json"))


@pytest.mark.parametrize("at", [30, 120])
def test_a_study_that_is_killed_goes_on_and_ends_with_the_same_runs(tmp_path, at):
    first, second, _ = PAIRS["start"]
    alone = run_config(tmp_path / "alone", second)
    Bench().run(alone)
    fuse = Fuse(at)
    killed = []
    bench = Bench(fuse)
    for changes in (first, second):
        try:
            bench.run(run_config(tmp_path / "beside", changes))
        except Killed:
            killed.append(changes)
            break
    assert killed
    for changes in (first, second):
        Bench().run(run_config(tmp_path / "beside", changes))
    assert records(run_config(tmp_path / "beside", second)) == records(alone)


@pytest.mark.parametrize("at", [2, 9])
def test_a_kill_while_stages_are_linked_leaves_no_half_of_one(tmp_path, monkeypatch, at):
    first, second, _ = PAIRS["start"]
    alone = run_config(tmp_path / "alone", second)
    Bench().run(alone)
    bench = Bench()
    bench.run(run_config(tmp_path / "beside", first))
    fuse, link = Fuse(at), os.link

    def killing_link(*paths):
        fuse.tick()
        link(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(sharing.os, "link", killing_link)
        with pytest.raises(Killed):
            bench.run(run_config(tmp_path / "beside", second))
    bench.run(run_config(tmp_path / "beside", second))
    assert records(run_config(tmp_path / "beside", second)) == records(alone)


def test_file_systems_without_links_get_copies(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(sharing.os, "link", refuse)
    alone = run_config(tmp_path / "alone", {"sft.epochs": 3})
    Bench().run(alone)
    bench = Bench()
    bench.run(run_config(tmp_path / "beside", {}))
    beside = run_config(tmp_path / "beside", {"sft.epochs": 3})
    assert "1/selected" in bench.run(beside).shared
    assert records(beside) == records(alone)


def test_a_run_that_collapses_is_a_result_and_is_not_tried_again(tmp_path):
    bench = Bench()
    config = run_config(tmp_path, {"select.rule": "threshold", "select.threshold": 9.9})
    result = bench.run(config)
    assert result.stopped.startswith("select: 0 pairs are kept")
    assert len(result.evaluations) == len(result.rows) == 1
    again = bench.run(config)
    assert again.stopped == result.stopped
    assert len(bench.backends) == 1
