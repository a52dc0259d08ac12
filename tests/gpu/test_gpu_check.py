"""The script that is run by hand on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import check


def stand_in(monkeypatch, tmp_path, program):
    """Replaces the script of a part's process."""
    script = tmp_path / "part.py"
    script.write_text(program)
    monkeypatch.setattr(check, "__file__", str(script))
    return list(check.run_parts(["decode"], small=False, seconds=30))


def test_figures_are_judged_and_printed(monkeypatch, tmp_path):
    low = check.EXPECTED["decode, quarter"].low
    lines = [f'FIGURE {{"name": "decode, quarter", "value": {value}, "keys": 512}}' for value in (low, 1000)]
    figures = stand_in(monkeypatch, tmp_path, f"print({lines[0]!r})\nprint('other')\nprint({lines[1]!r})")
    assert [figure.get("within") for figure in figures] == [True, False, None]
    assert figures[-1]["state"] == "ran"
    printed = [check.line_of(figure) for figure in figures]
    assert "within" in printed[0]
    assert check.EXPECTED["decode, quarter"].otherwise in printed[1]
    assert "keys=512" in printed[0]


def test_part_that_crashes_keeps_its_figures_and_is_named(monkeypatch, tmp_path):
    line = 'FIGURE {"name": "train step", "value": 1.0}'
    figures = stand_in(monkeypatch, tmp_path, f"print({line!r}, flush=True)\nraise SystemExit(3)")
    assert [figure.get("state") for figure in figures] == [None, "failed"]


def test_part_that_hangs_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setitem(check.PARTS, "decode", check.Part(check.decode, 1))
    (figure,) = stand_in(monkeypatch, tmp_path, "import time\ntime.sleep(60)")
    assert figure["state"] == "too long"


def test_part_without_time_is_not_begun():
    (figure,) = check.run_parts(["tiny"], small=True, seconds=1)
    assert figure == {"name": "part tiny", "state": "no time"}


@pytest.mark.slow
def test_whole_script_runs_on_cpu(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, check.__file__, "--small", "--minutes=30", f"--output={output}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())
    assert {figure["name"] for figure in figures} >= set(check.EXPECTED) - {"same tokens, bfloat16"}
    assert {figure["state"] for figure in figures if "state" in figure} == {"ran"}
