"""A conversation in the terminal: what the model is shown, what the user sees, and how it ends."""

import io
import json
import os
import pty
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from isheep_jax.cli.chat import chat
from isheep_jax.decode.requests import Completion, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.generate import main


class ScriptedEngine:
    """Answers with given pieces.

    `KeyboardInterrupt` among them stands for Ctrl-C at that moment, a dict for fields of the completion.
    """

    config = SimpleNamespace(max_length=50)

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    def stream(self, request, sampling):
        self.requests.append(request)
        text, fields = "", {}
        for piece in self.answers.pop(0):
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            if isinstance(piece, dict):
                fields = piece
            else:
                text += piece
                yield piece
        return Completion(request.id, text, **fields)


@pytest.fixture
def converse(monkeypatch, capsys):
    """Types the lines and returns what was printed on standard output and standard error."""

    def converse(engine, *lines, sampling=SamplingParams(max_tokens=8)):  # noqa: B008 (frozen)
        typed = "".join(line + "\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        chat(engine, sampling)
        return capsys.readouterr()

    return converse


def shown_to_model(engine) -> list[list[str]]:
    return [[f"{turn.role}: {turn.content}" for turn in request.prompt] for request in engine.requests]


def test_each_answer_sees_conversation_before_it(converse):
    engine = ScriptedEngine([" One", "."], ["Two."], ["Three."])
    assert converse(engine, "a", "", "b", "c").out == "One.\nTwo.\nThree.\n"
    assert shown_to_model(engine) == [
        ["user: a"],
        ["user: a", "assistant: One.", "user: b"],
        ["user: a", "assistant: One.", "user: b", "assistant: Two.", "user: c"],
    ]


def test_reset_begins_anew_also_with_random_numbers(converse):
    engine = ScriptedEngine(["One."], ["Two."], ["Three."])
    converse(engine, "a", "b", "/reset", "a")
    assert shown_to_model(engine)[2] == ["user: a"]
    first, second, third = (request.id for request in engine.requests)
    assert first == third != second


def test_quit_ends_it_and_misspelled_command_is_not_sent(converse):
    engine = ScriptedEngine(["One."])
    told = converse(engine, "/restart", "/usr/bin is what?", "/quit", "never")
    assert "no command /restart" in told.err
    assert "/reset" in told.err
    assert shown_to_model(engine) == [["user: /usr/bin is what?"]]


def test_space_around_answer_is_not_shown(converse):
    assert converse(ScriptedEngine(["\n ", " a", " ", "b", " \n"]), "x").out == "a b\n"


def test_ctrl_c_stops_answer_and_keeps_what_was_shown(converse):
    engine = ScriptedEngine(["half an ", "answer", KeyboardInterrupt], ["whole"])
    told = converse(engine, "a", "b")
    assert told.out == "half an answer\nwhole\n"
    assert "(stopped)" in told.err
    assert shown_to_model(engine)[1] == ["user: a", "assistant: half an answer", "user: b"]


def test_message_without_any_answer_is_forgotten(converse):
    engine = ScriptedEngine([KeyboardInterrupt], ["whole"])
    converse(engine, "a", "b")
    assert shown_to_model(engine)[1] == ["user: b"]


def test_message_that_does_not_fit_is_not_kept(converse):
    misfit = {"finish_reason": "error", "error": "the prompt has 60 tokens"}
    engine = ScriptedEngine([misfit], ["One."], [misfit], ["Two."])
    told = converse(engine, "a long message", "a", "another long message", "b")
    assert told.out == "One.\nTwo.\n"
    assert "(the message is too long: the prompt has 60 tokens)" in told.err
    assert "(the context of 50 tokens is full; /reset starts a new conversation)" in told.err
    assert shown_to_model(engine)[-1] == ["user: a", "assistant: One.", "user: b"]


@pytest.mark.parametrize(
    ("tokens", "note"), [(8, "(cut at --max_tokens=8)"), (5, "(the context of 50 tokens is full; /reset")]
)
def test_answer_that_was_cut_says_by_what(converse, tokens, note):
    engine = ScriptedEngine(["One", {"finish_reason": "length", "tokens": (3,) * tokens}])
    assert note in converse(engine, "a").err


ARGUMENTS = ["--chat", "--max_tokens=12", "--temperature=1", "--seed=3"]


def test_answers_are_same_after_reset(small_checkpoint, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"hi\nand?\n/reset\nhi\nand?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    main(["--model", str(small_checkpoint), *ARGUMENTS])
    printed = capsys.readouterr().out
    half = len(printed) // 2
    assert printed[:half] == printed[half:]
    assert printed.strip()


def test_terminal_is_asked_with_prompt_and_left_by_end_of_input(small_checkpoint):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "isheep_jax.generate", "--model", str(small_checkpoint), *ARGUMENTS]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    seen = b""
    while b"> " not in seen:
        seen += os.read(ours, 1024)
    assert b"/quit or Ctrl-D leaves" in seen
    os.write(ours, b"hi\n")
    while seen.count(b"> ") < 2:
        seen += os.read(ours, 1024)
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)


def test_base_model_without_template_is_told_so(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    with pytest.raises(UserError, match=r"--chat: .*/base is a base model without a chat template; name one"):
        main([f"--model={tmp_path}/base", "--chat"])
