"""What a command says reaches any terminal, log and pipe; output that cannot be written is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from isheep_jax.cli import signals, streams
from isheep_jax.cli.errors import run_command

streams.prepare(sys)
signals.listen()
sys.exit(run_command(lambda _: exec(sys.argv[1]), "isheep_jax.train"))
"""


def command(body: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess:
    line = f'exec "$@" {redirection}'
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-c", PROGRAM, body],
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.mark.parametrize("body", ["print('x')", "print('x' * 10**6)", "print('x'); sys.exit(0)"])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_output_that_cannot_be_written_is_one_line(body, redirection):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    result = command(body, redirection)
    (line,) = result.stderr.decode().splitlines()
    assert result.returncode == 2
    assert line.startswith("error: standard output cannot be written: ")
    assert "python -m isheep_jax.train" in line


def test_reader_that_has_gone_is_one_line():
    shell = '"$@" | head -n 1; echo "${PIPESTATUS[0]}"'
    body = "[print('line') for _ in range(10**5)]"
    result = subprocess.run(["bash", "-c", shell, "bash", sys.executable, "-c", PROGRAM, body], capture_output=True)
    assert result.stdout == b"line\n2\n"
    (line,) = result.stderr.decode().splitlines()
    assert "it is closed" in line


def test_command_without_any_stream_ends_as_usual():
    body = "sys.stderr.write('x'); sys.exit(3 if not sys.stdin.read() else 4)"
    assert command(body, "<&- >&- 2>&-").returncode == 3


def test_file_never_gets_the_descriptor_of_a_closed_stream(tmp_path):
    assert command(f"sys.exit(open({str(tmp_path / 'file')!r}, 'w').fileno())", ">&- 2>&-").returncode > 2


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_characters_that_encoding_lacks_are_replaced(environment):
    result = command(r"print('a \u00b7 \ud83d b')", **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"a ? ? b\n", b"")
