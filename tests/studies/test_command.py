"""The command runs what is missing of a study, prints its table and goes on where it stopped."""

import json

import pytest
from scripted_backend import ScriptedBackend, ScriptedEvaluator

from isheep_jax import study
from isheep_jax.errors import UserError
from isheep_jax.loop.inputs import read_inputs
from isheep_jax.named_configs import named_config
from isheep_jax.studies.definitions import STUDIES
from isheep_jax.studies.runs import RunFactory

SMALL = ["--config=tiny", "--study=filters", "--synthesize.instructions=30", "--iterations=2", "--select.buckets=none"]


@pytest.fixture
def backends(monkeypatch):
    """The command's models are scripted; the backends that it makes."""
    made = []

    def backend(config):
        made.append(ScriptedBackend())
        return made[-1]

    evaluate = ScriptedEvaluator(lambda model: 0.5, figures={"content": {"value": 0.5}})
    factory = RunFactory(backend, lambda *_: {"tiny": evaluate}, lambda settings: frozenset(), study.WarningReporter)
    monkeypatch.setattr(study, "_run_factory", lambda: factory)
    return made


def test_command_runs_shares_resumes_and_reports(tmp_path, backends, capsys):
    arguments = [*SMALL, f"--workdir={tmp_path}", "--rows", "self_assessment", "random"]
    with pytest.raises(UserError, match=f"--report: {tmp_path} has no run of this study yet"):
        study.main([*arguments, "--report"])
    study.main([*arguments, "--seeds", "1"])
    assert "2 runs made in" in capsys.readouterr().out
    study.main([*arguments, "--seeds", "1", "2", "--results", str(tmp_path / "results.json")])
    out = capsys.readouterr().out
    assert len(backends) == 4
    assert "| self-assessment | 2 |" in out
    assert "tiny seed 2 random:" in out
    study.main([*arguments, "--seeds", "1", "2", "--report"])
    assert len(backends) == 4
    assert capsys.readouterr().out.partition("###")[2] == out.partition("###")[2]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["synthesize.instructions"] == 30
    assert found["bases"]["tiny"]["random"]["runs"].keys() == {"1", "2"}


def test_row_of_two_studies_is_run_once(tmp_path, backends):
    study.main([*SMALL, f"--workdir={tmp_path}", "--seeds", "1", "--rows", "self_assessment"])
    study.main([*SMALL, f"--workdir={tmp_path}", "--seeds", "1", "--study=score_reading", "--rows", "expected"])
    assert len(backends) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=tiny"], "--study is missing"),
        (["--config=tiny", "--study=judges"], r"no study 'judges'; did you mean 'judge'\?"),
        (["--config=tiny", "--study=judge", "--seeds", "x"], "--seeds: 'x' is not a list"),
        (["--config=tiny", "--study=judge", "--seed=3"], "--seed: there is no such setting; did you mean --seeds"),
        (["--config=tiny", "--study=judge", "--select.rul=none"], "did you mean --select.rule"),
        (["--config=qwen1_5_7b_v5e", "--study=judge"], "--evaluate.tasks: it is empty"),
        (["--config=tiny", "--study=judge", "--workdir=gs://a/b"], "--workdir: runs of a study share files by links"),
        (["--config=tiny", "--study=judge", "--results", "nowhere/a.json"], "--results: there is no directory nowhere"),
        (["--config=tiny", "--study=judge", "--synthesize.seeds=none.jsonl"], "none.jsonl"),
        (["--config=tiny", "--study=judge", "--base", "a/x", "b/x"], "--base: two bases have the same name"),
    ],
)
def test_bad_input_is_one_line_before_any_run(arguments, message, backends):
    with pytest.raises(UserError, match=message) as error:
        study.main(arguments)
    assert "\n" not in str(error.value)
    assert backends == []


@pytest.mark.parametrize("name", STUDIES)
def test_tiny_world_has_what_every_row_reads(name):
    config = named_config("tiny_domain" if STUDIES[name].needs else "tiny")
    for row in STUDIES[name].rows:
        read_inputs(row.settings(config), None)
