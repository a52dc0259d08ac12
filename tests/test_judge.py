"""The command that checks a judge: its table, its errors, and the tiny model as a judge that passes."""

import contextlib
import json

import pytest

from isheep_jax import judge
from isheep_jax.cli.judge_table import judge_lines
from isheep_jax.config import GuardConfig
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError
from isheep_jax.loop.judging.check import Estimate, JudgeCheck, ReadingCheck


def reading_check(auc, low, **more):
    kinds = {"shuffled": Estimate(auc, low, 1.0), "echo": Estimate(1.0, 1.0, 1.0)}
    settings = {"by_rule": ("echo",), "wins": 0.75, "ties": 0.125, "length": None, **more}
    return ReadingCheck(Estimate(auc, low, 1.0), kinds, **settings)


CHECK = JudgeCheck(
    24,
    72,
    {"rubric": reading_check(0.52, 0.4, by_rule=(), mass=0.25), "lift per token": reading_check(0.9, 0.8, length=-0.5)},
    "rubric",
    ("shuffled",),
    {"rubric and lift": 0.125, "rubric and likelihood": None},
)


def test_the_table_has_a_column_per_reading_and_a_row_per_damage():
    lines = judge_lines(CHECK, GuardConfig())
    cells = {line[:29].strip(): line[29:].split() for line in lines[1:-4]}
    assert lines[0].startswith("24 tasks, 72 responses: ")
    assert lines[0].endswith("the mean is over shuffled")
    assert cells[""] == ["rubric", "lift", "per", "token"]
    assert cells["shuffled"] == ["0.52", "(0.40", "to", "1.00)", "0.90", "(0.80", "to", "1.00)"]
    assert cells["echo"] == ["1.00", "(1.00", "to", "1.00)", "1.00", "by", "rules"]
    assert cells["ties"] == ["0.12", "0.12"]
    assert cells["correlation with length"] == ["-", "-0.50"]
    assert cells["mass on the ten scores"] == ["0.25", "-"]
    assert cells["verdict"] == ["fails", "passes"]
    assert "rubric and lift 0.12, rubric and likelihood -" in lines[-4]
    assert "shuffled: its words in random order; echo: the instruction itself" in lines[-2]
    assert lines[-1] == "selection by rubric: AUC 0.52 (0.40 to 1.00), fails (guard.min_auc 0.7)"


def test_the_tiny_model_is_a_judge_that_passes_and_the_table_is_also_json(tmp_path, capsys):
    output = tmp_path / "check.json"
    judge.main(["--config=tiny", "--limit=12", "--readings=rubric,likelihood", f"--output={output}"])
    text = capsys.readouterr().out
    assert "selection by together: AUC 0." in text or "selection by together: AUC 1." in text
    result = json.loads(output.read_text())
    assert result["tasks"] == 12
    assert list(result["readings"]) == ["rubric", "likelihood per token", "likelihood in total", "together"]
    rubric = result["readings"]["rubric"]
    assert rubric["auc"]["value"] > 0.75
    assert rubric["auc"]["low"] > 0.5
    assert rubric["mass"] > 0.9


def test_pairs_of_a_file_are_used_in_place_of_the_seeds(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"Add one to {n}.", "better": f"{n + 1}", "worse": "red"} for n in range(1, 19)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(SystemExit):  # whether it passes is not the point
        judge.main(["--config=tiny", f"--pairs={path}"])
    text = capsys.readouterr().out
    assert "18 tasks, 36 responses" in text
    assert "\n  worse " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=tiny", "--readings=lifts"], "--readings: 'lifts' is no reading; use some of"),
        (["--config=tiny", "--readings=lift,lift"], "--readings: 'lift' is there twice"),
        (["--config=tiny", "--readings=self_consistency"], "--readings: 'self_consistency' cannot be checked"),
        (["--config=tiny", "--judge=http://a/v1", "--readings=lift"], "'lift' cannot be checked with a server"),
        (["--config=tiny", "--assess.readings="], "--readings: the config has none"),
        (["--config=tiny", "--judge=nowhere"], "--assess.judge: nowhere is no directory"),
        (["--config=tiny", "--limit=-1"], "--limit"),
        (["--config=tiny", "--limit=3"], "--limit: a check needs at least 5 tasks"),
        (["--config=tiny", "--pairs=none.jsonl"], "guard.pairs: cannot read none.jsonl"),
        (["--config=tiny", "--output=nowhere/check.json"], "--output: there is no directory nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        judge.main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_readings_of_the_command_line_take_the_place_of_those_that_the_config_weighs():
    weighed = ["--config=smollm2_135m", "--select.weights=3,1,1,1"]
    config = judge._config(judge.COMMAND.parse([*weighed, "--readings=all"]))
    check_values(config)
    assert len(config.assess.readings) > 3
    assert config.select.weights == ()
    assert judge._config(judge.COMMAND.parse(weighed)).select.weights == (3.0, 1.0, 1.0, 1.0)


def test_a_judge_that_fails_is_an_exit_code_with_what_would_do(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    # The tiny model has not learned which of these numbers is better; as English, the other is unlikely.
    rows = [{"instruction": f"Name number {n}.", "better": "The number.", "worse": "The number."} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stop:
        judge.main(["--config=tiny", f"--pairs={path}"])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    assert "selection by rubric: AUC 0.50 (0.50 to 0.50), fails" in text
    assert "so another model should judge (assess.judge)" in text
