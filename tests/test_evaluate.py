"""The command evaluate, on the embedded model."""

import json
import re
import sys

import pytest

from isheep_jax import evaluate
from isheep_jax.errors import UserError

SMALL = ["--model", "tiny", "--tasks", "tiny,tiny_domain", "--limit", "12"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def run(output, capsys, *arguments):
    evaluate.main([*SMALL, "--output", str(output), *arguments])
    return capsys.readouterr().out


def test_tables_say_how_many_samples_were_used(output, capsys):
    out = run(output, capsys)
    assert "tiny · tiny: 12 responses in" in out
    assert "tiny world (12 of 1000 samples)" in out
    assert re.search(r"tiny +0\.\d{3} ± 0\.\d{3} +(0|1)\.\d{3} ± 0\.\d{3}", out)
    assert out.endswith(f"results: {output}\n")
    results = json.loads((output / "evaluation.json").read_text())
    assert list(results) == ["tiny", "tiny_domain"]
    for task, result in results.items():
        lines = (output / "evaluation" / task / "samples.jsonl").read_text().splitlines()
        values = [json.loads(line)["values"]["accuracy"] for line in lines]
        assert len(values) == result["count"] == 12
        assert result["accuracy"] == pytest.approx(sum(values) / 12)
        assert {"weights", "prompts", "chat_template", "compute_dtype"} <= result["settings"].keys()


def test_the_same_command_again_measures_nothing(output, capsys):
    table = run(output, capsys).splitlines()[-9:]
    before = (output / "evaluation.json").read_bytes()
    again = run(output, capsys)
    assert "responses" not in again
    assert again.splitlines()[-9:] == table
    assert (output / "evaluation.json").read_bytes() == before


def test_other_tasks_are_added_to_the_results(output, capsys):
    run(output, capsys)
    out = run(output, capsys, "--tasks", "tiny", "--tiny.split", "selection", "--output", f"{output}2")
    assert "tiny_domain" not in out
    run(output, capsys, "--tasks", "tiny")
    assert list(json.loads((output / "evaluation.json").read_text())) == ["tiny", "tiny_domain"]


def test_other_settings_in_the_same_place_are_refused(output, capsys):
    run(output, capsys)
    with pytest.raises(UserError, match=r"compute_dtype was \"float32\", now \"bfloat16\"; .*--output"):
        run(output, capsys, "--compute_dtype", "bfloat16")


def test_a_comparison_prints_differences_and_keeps_every_change(output, capsys):
    run(output / "long", capsys)
    run(output / "short", capsys, "--max_tokens", "2")
    places = [str(output / "long"), str(output / "short")]
    evaluate.main(["--compare", *places, "--tasks", "tiny", "--output", str(output)])
    out = capsys.readouterr().out
    assert out.startswith(f"A: {places[0]}\nB: {places[1]}\n\ntiny world: 12 samples\n")
    assert "max_tokens" in out
    comparison = json.loads((output / "comparison.json").read_text())
    assert list(comparison["tasks"]) == ["tiny"]
    difference = comparison["tasks"]["tiny"]["differences"]["accuracy"]
    assert len(comparison["tasks"]["tiny"]["changed"]) == difference["better"] + difference["worse"]
    assert out.endswith(f"every sample that changed: {output / 'comparison.json'}\n")
    evaluate.main(["--compare", places[0], places[0]])
    out = capsys.readouterr().out
    assert "+0.000 to +0.000" in out
    assert "no sample changed" in out


def test_logs_are_written_for_the_viewer(output, capsys):
    pytest.importorskip("inspect_ai")
    out = run(output, capsys, "--inspect_log", str(output / "logs"))
    assert f"inspect view --log-dir {output / 'logs'}" in out
    assert len(list((output / "logs").glob("*.eval"))) == 2


def test_logs_without_the_package_are_refused_before_anything_is_measured(output, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(UserError, match=r"isheep_jax\[inspect\]"):
        run(output, capsys, "--inspect_log", str(output / "logs"))
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny"], "--tasks is missing: name some of .*tiny"),
        (["--model", "tiny", "--tasks", "ifevl"], "there is no task 'ifevl'; did you mean 'ifeval'"),
        (["--tasks", "tiny"], "--model is missing"),
        (["--model", "nowhere/at all", "--tasks", "tiny"], "--model: nowhere/at all is no directory"),
        (["--model", "tiny", "--tasks", "tiny", "--iteration", "1"], "tiny is not a run's directory"),
        (["--compare", "x"], "--compare needs two evaluated models, not 1"),
        (["--compare", "x", "y"], "x does not exist"),
        (["--compare", "x", "y", "--model", "z"], "--model: --compare measures nothing"),
        (["--model", "x", "--tasks", "tiny", "--iteration", "1", "--all_iterations"], "or --all_iterations out"),
        (["--model", "tiny", "--tasks", "tiny", "--limit", "-1"], "--limit: -1 is out of range"),
        (["--model", "tiny", "--tasks", "squad", "--task_data", "/nowhere"], r"/nowhere/squad/.* is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(arguments)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_fewer_samples_are_shown_and_the_fuller_result_stays(output, capsys):
    run(output, capsys)
    before = (output / "evaluation.json").read_bytes()
    assert "tiny world (3 of 1000 samples)" in run(output, capsys, "--limit", "3")
    assert (output / "evaluation.json").read_bytes() == before


def test_missing_data_of_a_later_task_is_found_before_the_first_is_measured(output, capsys):
    with pytest.raises(UserError, match=r"--task_data: /nowhere/squad/.* is missing"):
        run(output, capsys, "--tasks", "tiny,squad", "--task_data", "/nowhere")
    assert "responses" not in capsys.readouterr().out


def test_lost_samples_are_made_anew(output, capsys):
    run(output, capsys)
    samples = output / "evaluation" / "tiny" / "samples.jsonl"
    before = samples.read_bytes()
    samples.unlink()
    run(output, capsys)
    assert samples.read_bytes() == before


def test_damaged_results_are_one_line(output, capsys):
    run(output, capsys)
    (output / "evaluation.json").write_text('{"tiny": {}}')
    with pytest.raises(UserError, match=r"evaluation\.json"):
        run(output, capsys)
