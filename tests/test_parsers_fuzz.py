"""Any text at all is read without an error and in time, and what is read of it keeps the parsers' promises."""

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from test_degenerate_text import READERS, seconds

from isheep_jax.decode.requests import Completion
from isheep_jax.errors import printable
from isheep_jax.loop.filters.labels import is_no_input
from isheep_jax.loop.filters.verdicts import cut_reason
from isheep_jax.loop.judging.scores import parse_score
from isheep_jax.loop.prompting.few_shot import parse

# What the patterns look for, so that texts nearly match them, repeated so often that quadratic time would show.
PIECES = st.sampled_from(
    [
        *("###", "#", "\n", "\r\n", "\n\n", " ", "\t", "1", "9", "10", "1.", "2) ", ":", "：", "**", "*", "_", "`"),
        *("Instruction", "instruction:", "Input:", "**Input:**", "Output:", "no input", "none", "N/A", "<noinput>"),
        *("[[", "]]", "[", "]", "(", ")", "<", ">", "/10", "out of", "Rating: ", "A. ", "?", "!", ".", ",", "。", "-"),
        *("def f():\n", "import a\n", "Answer: ", "I cannot help", "i'm sorry, but i", "i am an ai and ", "```", "~~~"),
        *("can you", "https:", "assistant:\n", "<think>", "</think>", "the following ", "a", "É", "é", "答", "۵"),
        *("\x00", "\x1b", "\u202e", "\ud83d"),
    ]
)
RUNS = st.builds(lambda piece, count: piece * count, PIECES, st.sampled_from([1, 1, 1, 2, 3, 500]))
TEXTS = st.lists(RUNS | st.text(max_size=12), max_size=12).map("".join)


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(text=TEXTS)
def test_any_text_is_read(reader, text):
    with seconds(3.0):
        READERS[reader](text)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(text=TEXTS, finished=st.booleans())
def test_tasks_are_parts_of_the_completion(text, finished):
    plain = text.replace("\r\n", "\n")
    for task in parse(text, finished):
        assert task.instruction in plain
        assert task.input in plain
        assert not is_no_input(task.input)
        assert (task.instruction, task.input) == (task.instruction.strip(), task.input.strip())


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(text=TEXTS, parser=st.sampled_from(["strict", "paper"]))
def test_a_score_is_from_1_to_10_or_none(text, parser):
    assert parse_score(text, parser) in (None, *range(1, 11))


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(text=TEXTS, stop=st.sampled_from(["", "\nUser:", "<|im_end|>"]))
def test_only_an_answer_that_a_stop_string_ended_is_cut(text, stop):
    assert stop or cut_reason(Completion("1", text, stop=stop), text, text) is None


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(text=TEXTS | st.text())
def test_what_is_shown_is_encodable_and_without_controls(text):
    shown = printable(text, most=None)
    shown.encode()
    assert not [c for c in shown if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]
    assert printable(shown, most=None) == shown
