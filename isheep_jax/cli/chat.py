"""Holds a conversation in the terminal, with answers shown as they are decoded."""

import contextlib
import re
import sys

from isheep_jax.cli.output import as_data, show
from isheep_jax.cli.signals import interrupts_handled
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.text.conversation import Message

_HELP = "/reset starts a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(engine: Engine, sampling: SamplingParams) -> None:
    """Reads messages from standard input and answers each, until /quit or the end of the input.

    Answers go to standard output, everything else to standard error. The random numbers of an answer come from the
    engine's seed and the index of the turn in its conversation.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # editing of the line; not on every platform
            import readline  # noqa: F401
        _note(_HELP)
    sys.stdin.reconfigure(errors="replace")
    with interrupts_handled():
        _converse(engine, sampling, terminal)


def _converse(engine: Engine, sampling: SamplingParams, terminal: bool) -> None:
    turns: list[Message] = []
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            _note(_HELP)
            continue
        if text == "/quit":
            return
        if text == "/reset":
            turns.clear()
            _note("a new conversation")
        elif re.fullmatch(r"/\w+", text):
            _note(f"there is no command {text}; {_HELP}")
        elif text:
            turns += _turn(engine, sampling, (*turns, Message("user", text)))


def _turn(engine: Engine, sampling: SamplingParams, conversation: tuple[Message, ...]) -> list[Message]:
    """Answers the conversation's last message. Returns that message and the answer; nothing where it has none."""
    request = Request(f"turn {len(conversation) // 2}", conversation)
    text, completion = _show(engine, request, sampling)
    full = f"the context of {engine.config.max_length} tokens is full; /reset starts a new conversation"
    if completion is None:
        _note("stopped")
    elif completion.finish_reason == "error":
        _note(full if len(conversation) > 1 else f"the message is too long: {completion.error}")
        return []
    elif completion.finish_reason == "length":
        cut = len(completion.tokens) == sampling.max_tokens
        _note(f"cut at --max_tokens={sampling.max_tokens}" if cut else full)
    return [conversation[-1], Message("assistant", text)] if text or completion else []


def _show(engine: Engine, request: Request, sampling: SamplingParams) -> tuple[str, Completion | None]:
    """Prints the answer as it comes. Returns its text and the completion, or None when Ctrl-C stopped it."""
    text = shown = ""
    completion = None
    stream = engine.stream(request, sampling)
    try:
        while True:
            text += next(stream)
            # A template may put a space before an answer; the loop strips it too.
            visible = text.strip()
            print(as_data(visible[len(shown) :]), end="", flush=True)
            shown = visible
    except StopIteration as end:
        completion = end.value
    except KeyboardInterrupt:
        pass
    if completion is None or completion.finish_reason != "error":
        print(flush=True)
    return shown, completion


def _note(text: str) -> None:
    show(f"({text})", stream=sys.stderr)
