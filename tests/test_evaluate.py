"""The command evaluate, on the embedded model."""

import json
import re

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny"], "--tasks is missing: name some of .*tiny"),
        (["--model", "tiny", "--tasks", "ifevl"], "there is no task 'ifevl'; did you mean 'ifeval'"),
        (["--tasks", "tiny"], "--model is missing"),
        (["--model", "nowhere/at all", "--tasks", "tiny"], "--model: nowhere/at all is no directory"),
        (["--model", "tiny", "--tasks", "tiny", "--iteration", "1"], "tiny is not a run's directory"),
        (["--model", "x", "--tasks", "tiny", "--iteration", "1", "--all_iterations"], "or --all_iterations out"),
        (["--model", "tiny", "--tasks", "tiny", "--limit", "-1"], "--limit: -1 is out of range"),
        (["--model", "tiny", "--tasks", "squad", "--task_data", "/nowhere"], r"/nowhere/squad/.* is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(arguments)
    assert "\n" not in str(error.value)
