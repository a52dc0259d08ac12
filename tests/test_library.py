"""Use from Python: the examples of docs/library.md run, and the package is silent."""

import re
import subprocess
import sys
from pathlib import Path

from processes import one_device

import isheep_jax

PAGE = Path(__file__).parent.parent / "docs" / "library.md"


# What a reader of the page might check after its last example.
CHECKS = """
assert (Path("fine_tuned") / "adapter").is_dir()
assert len(summaries) == 2
assert run(replace_settings(named_config("tiny"), small)) == summaries
"""


def test_examples_of_page_run(tmp_path):
    *examples, logging_example = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    compile(logging_example, str(PAGE), "exec")
    script = tmp_path / "page.py"
    script.write_text("\n".join(["from pathlib import Path", *examples, CHECKS]))
    result = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=one_device(PYTHONPATH=str(PAGE.parents[1])),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    # What the page's own lines print, and nothing else.
    assert len(result.stdout.splitlines()) == 13


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
