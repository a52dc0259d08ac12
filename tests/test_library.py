"""Use from Python: the examples of docs/library.md run, and the package is silent."""

import re
import subprocess
import sys
from pathlib import Path

import isheep_jax

PAGE = Path(__file__).parent.parent / "docs" / "library.md"


def test_examples_of_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    *examples, logging_example = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    compile(logging_example, str(PAGE), "exec")
    printed = capsys.readouterr()
    assert printed.err == ""
    # Two completions, two log-probabilities, two times two choices, one fine-tuning, one summary; nothing else.
    assert len(printed.out.splitlines()) >= 8
    assert (tmp_path / "fine_tuned" / "adapter").is_dir()
    assert len(names["summaries"]) == 2
    again = names["run"](names["replace_settings"](names["named_config"]("tiny"), names["small"]))
    assert again == names["summaries"]
    assert capsys.readouterr().out == ""


def test_public_names_are_there():
    for name in isheep_jax.__all__:
        assert getattr(isheep_jax, name).__name__ == name


def test_package_is_silent_until_logging_is_configured():
    code = (
        "import logging, isheep_jax\n"
        "logging.getLogger('isheep_jax.runtime.run').warning('quiet')\n"
        "logging.basicConfig()\n"
        "logging.getLogger('isheep_jax.runtime.run').warning('loud')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert "loud" in result.stderr
    assert "quiet" not in result.stderr
