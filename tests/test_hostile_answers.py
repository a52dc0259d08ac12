"""Whatever a server sends is an answer or an error of one line, and whatever a judge writes is a score or none."""

import contextlib
import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from isheep_jax.chat_server import Answer, ChatServer, _Failed, _line, _message
from isheep_jax.loop.judging.scores import parse_score

QUICK = settings(derandomize=True, max_examples=100, deadline=5000, database=None)
SERVER = ChatServer("http://127.0.0.1:9/v1", "m", "NO_SUCH_KEY", concurrency=1, setting="evaluate.judge")

NAMES = st.sampled_from(
    ["choices", "message", "content", "finish_reason", "logprobs", "top_logprobs", "token", "logprob", "usage", "text"]
) | st.sampled_from(["prompt_tokens", "completion_tokens", "type", "error"])
TEXTS = st.text() | st.sampled_from(["\ud83d", "\x1b[2J", "<think>", "</think>", "length", "text", "8||good"])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from([10**400, math.inf, math.nan])
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4))
MESSAGES = st.fixed_dictionaries({"content": VALUES}) | VALUES
CHOICES = st.fixed_dictionaries({"message": MESSAGES}, optional={"finish_reason": VALUES, "logprobs": VALUES}) | VALUES
ANSWERS = st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2)}, optional={"usage": VALUES}) | VALUES
BODIES = ANSWERS.map(lambda value: json.dumps(value).encode()) | st.binary()


@QUICK
@given(BODIES)
def test_any_body_is_an_answer_or_a_failed_attempt(body):
    with contextlib.suppress(_Failed):
        answer = SERVER._parse(body)
        assert isinstance(answer, Answer)
        answer.text.encode()
        assert answer.finish_reason in ("stop", "length")
        assert isinstance(answer.sent, int)
        assert all(not math.isnan(p) for token in answer.alternatives for p in token.values())


@QUICK
@given(BODIES)
def test_any_error_of_a_server_is_one_short_line(body):
    line = _line(_message(body))
    assert "\n" not in line
    assert "\x1b" not in line
    line.encode()


PIECES = ["8", "10", "/10", ".", ",", "-", " to ", " out of ", "Rating: ", "**", "\n", "1. ", " points", "：", "½"]
JUDGMENTS = st.lists(st.text(max_size=5) | st.sampled_from(PIECES), max_size=12).map("".join)


@QUICK
@given(JUDGMENTS, st.sampled_from(["strict", "paper"]))
def test_any_judgment_is_a_score_from_1_to_10_or_none(text, parser):
    score = parse_score(text, parser)
    assert score is None or (isinstance(score, int) and 1 <= score <= 10)
