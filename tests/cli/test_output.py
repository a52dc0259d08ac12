"""Text of models, files and servers is only shown: it moves no cursor, reorders nothing and fills no screen."""

import ast
import io
import sys
from pathlib import Path

import pytest

import isheep_jax
from isheep_jax.cli.console import Console
from isheep_jax.cli.errors import report_error
from isheep_jax.cli.output import as_data, show
from isheep_jax.errors import MOST_IN_LINE, UserError, printable, quoted

HOSTILE = "\x1b[2J\x1b]0;x\x07\r\x00\x08\x9b1m\u202e\u2066\u200f\u2028\ufeff\U000e0041\ud83d [bold]:skull: ../../etc"
RAW = set("\x1b\x07\r\x00\x08\x9b\u202e\u2066\u200f\u2028\ufeff\U000e0041\ud83d")
# Modules that print for other programs, or nothing but their own words.
OTHERS = {"arguments.py", "output.py", "pretrain.py", "tiny_domain.py", "isolation.py"}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_characters_that_a_terminal_acts_on_become_escapes():
    shown = printable(HOSTILE)
    assert not RAW & set(shown)
    assert shown.startswith(r"\x1b[2J\x1b]0;x\x07\r\x00\x08\x9b1m\u202e")
    assert shown.endswith("[bold]:skull: ../../etc")
    assert not RAW & set(quoted(HOSTILE))


def test_ordinary_text_is_shown_as_it_is():
    text = "Größe\tназвание 答案 ۵ 👩‍🚀 می‌خواهم ≤ “a”\n  second line"
    assert printable(text) == text


def test_a_long_line_is_cut_and_says_so():
    shown = printable(f"{'a' * 1_000_000}\nb")
    assert len(shown) < MOST_IN_LINE + 100
    assert shown.endswith(f"... ({1_000_000 - MOST_IN_LINE} more characters)\nb")


def test_no_line_of_the_console_or_its_log_has_them(tmp_path):
    stream = Terminal()
    with Console(tmp_path, stream=stream, interactive=True) as console:
        console.note(HOSTILE)
        console.warn(HOSTILE)
        with console.stage(1, HOSTILE, 1, HOSTILE) as progress:
            progress.advance(1, dropped=HOSTILE)
    log = (tmp_path / "log.txt").read_text()
    assert not RAW & set(log)
    assert r"\x1b[2J" in log
    # The colors of a warning are the console's own.
    assert r"\x1b[2J" in stream.getvalue()
    assert not [raw for raw in ("\x1b[2J", "\x1b]0;", "\r\x00", "\u202e", "\x9b") if raw in stream.getvalue()]
    assert "[bold]:skull:" in stream.getvalue()


def test_no_error_has_them(capsys):
    assert report_error(UserError(f"--judge: {HOSTILE}"), "isheep_jax.train", []) == 2
    assert report_error(KeyboardInterrupt(), "isheep_jax.train", [HOSTILE.replace("\ud83d", "")]) == 130
    assert not RAW & set(capsys.readouterr().err)


def test_a_table_has_none(capsys):
    show(f"a\n{HOSTILE}")
    assert not RAW & set(capsys.readouterr().out)


def test_a_completion_is_raw_in_a_file_and_harmless_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert as_data(HOSTILE) == HOSTILE
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert not RAW & set(as_data(HOSTILE))


@pytest.mark.parametrize("path", sorted(Path(isheep_jax.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_every_line_is_printed_by_the_shared_function(path):
    if path.name in OTHERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and node.args:
            text = node.args[0]
            assert isinstance(text, ast.Call), f"{path.name}, line {node.lineno}"
            assert text.func.id in ("printable", "as_data"), f"{path.name}, line {node.lineno}"
