"""The client of OpenAI-compatible servers, against a stand-in on loopback."""

import json
import socket
import threading
import time

import pytest
from chat_stand_in import Server, fails, says

from isheep_jax import chat_server
from isheep_jax.chat_server import ChatServer, without_thought
from isheep_jax.errors import UserError

KEY = "sk-a-secret"


def asked(prompt, **fields):
    return {"messages": [{"role": "user", "content": prompt}], **fields}


def server_at(url, concurrency=4, **options):
    return ChatServer(url, "big", "SOME_KEY", concurrency=concurrency, setting="evaluate.judge", **options)


def ask(url, *questions, **options):
    """Returns the answers by the index of their question."""
    return dict(server_at(url, **options).answers(questions or [asked("p")]))


def test_a_question_is_sent_with_model_and_key_and_its_answer_says_what_it_cost(serve, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY + "\n")
    server = serve(lambda prompt, _: says("yes", "length", usage={"prompt_tokens": 7, "completion_tokens": 2}))
    (answer,) = ask(server.url + "/", asked("p", temperature=0.0, max_tokens=5)).values()
    assert (answer.text, answer.finish_reason, answer.sent, answer.received) == ("yes", "length", 7, 2)
    ((path, headers, body),) = server.seen
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "big", **asked("p", temperature=0.0, max_tokens=5)}


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    server = serve(lambda prompt, _: says("1"))
    ask(server.url)
    assert server.seen[0][1]["Authorization"] is None


def test_the_most_probable_tokens_come_with_their_logprobs(serve):
    top = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}]
    server = serve(lambda prompt, _: says("A", logprobs={"content": [{"token": "A", "top_logprobs": top}]}))
    assert ask(server.url)[0].alternatives == ({"A": -0.1, "B": -2.5},)


def test_an_answer_holds_nothing_that_a_file_cannot(serve):
    top = [{"token": "A\ud83d", "logprob": -0.1}, {"token": "B", "logprob": float("nan")}, {"token": "C"}]
    server = serve(lambda prompt, _: says("cut \ud83d", logprobs={"content": [{"token": "A", "top_logprobs": top}]}))
    (answer,) = ask(server.url).values()
    assert (answer.text, answer.alternatives) == ("cut ?", ({"A?": -0.1},))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_another_attempt_may_mend_gets_one(serve, status):
    server = serve(lambda prompt, attempt: says("9") if attempt == 3 else fails(status, **{"Retry-After": "0"}))
    assert ask(server.url)[0].text == "9"
    assert server.attempts["p"] == 3


def test_a_server_is_asked_again_when_it_said_and_no_later_than_a_minute(serve, monkeypatch):
    # Other threads of the process, such as a progress bar's, wait for events of their own.
    pauses, wait, here = [], threading.Event.wait, threading.get_ident()

    def counted(self, seconds=None):
        return wait(self, seconds) if threading.get_ident() != here else pauses.append(seconds) and False

    monkeypatch.setattr(threading.Event, "wait", counted)
    client = server_at(serve(lambda prompt, n: says("9") if n == 3 else fails(429, **{"Retry-After": "7" * n})).url)
    assert client._ask(asked("p"), threading.Event()).text == "9"
    assert [p for p in pauses if p is not None] == [7.0, 60.0]


def test_a_burst_of_429_loses_nothing_and_waits_while_other_questions_are_answered(serve):
    """Many questions are refused more often than there are attempts, but never all of them at once."""
    lock, turns = threading.Lock(), iter(range(10_000))

    def answer(prompt, attempt):
        with lock:
            turn = next(turns)
        return says(prompt) if turn % 6 == 0 or turn > 120 else fails(429, "slow down")

    server = serve(answer)
    answers = ask(server.url, *(asked(str(n)) for n in range(40)), concurrency=8)
    assert {n: a.text for n, a in answers.items()} == {n: str(n) for n in range(40)}
    assert max(server.attempts.values()) > 3


def test_a_dropped_connection_a_late_answer_and_a_broken_one_are_asked_again(serve):
    whole = json.dumps(says("x" * 50)[1]).encode()
    late = threading.Event()

    def answer(prompt, attempt):
        if attempt > 1:
            late.set()
            return says(prompt)
        if prompt == "late":
            late.wait(10)
        return {"cut": (200, whole, {"Content-Length": "9999"}), "page": (200, b"<html>sorry</html>", {})}.get(
            prompt, (200, whole[:40], {})
        )

    server = serve(answer)
    names = ["cut", "page", "broken", "late"]
    answers = ask(server.url, *map(asked, names), timeout=0.5)
    assert [answers[n].text for n in range(4)] == names


def test_a_question_that_a_server_fails_at_while_it_answers_others_is_an_error_of_its_own(serve):
    server = serve(lambda prompt, _: fails(500, "boom") if prompt == "bad" else says("fine"))
    answers = ask(server.url, asked("good"), asked("bad"), asked("good too"), concurrency=1)
    assert [answers[n].finish_reason for n in range(3)] == ["stop", "error", "stop"]
    assert "500" in answers[1].error


def test_what_has_arrived_is_given_before_an_error(serve):
    server = serve(lambda prompt, _: says("ok") if prompt in "ab" else fails(402, "gone"))
    answers = server_at(server.url, concurrency=1).answers([asked(p) for p in "abcd"])
    assert [(i, a.text) for i, a in (next(answers), next(answers))] == [(0, "ok"), (1, "ok")]
    with pytest.raises(UserError, match=r"402.*gone"):
        next(answers)


def test_an_error_shows_no_control_characters(serve):
    server = serve(lambda prompt, _: fails(404, "gone\x1b[2J\x00\ud83d\nnow"))
    with pytest.raises(UserError, match=r"gone\\x1b\[2J\\x00\\ud83d now$"):
        ask(server.url)


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(chat_server, "PAUSES", (0.01,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"--evaluate.judge: http://127.0.0.1:{port} does not answer.*refused"):
        ask(f"http://127.0.0.1:{port}")


def test_a_proxy_is_not_asked_for_this_machine(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(serve(lambda prompt, _: says("here")).url)[0].text == "here"


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404])
def test_what_no_attempt_mends_ends_at_once_without_the_key(serve, monkeypatch, status):
    monkeypatch.setenv("SOME_KEY", KEY)
    other = serve(lambda prompt, _: says("not for you"))
    server = serve(lambda prompt, _: fails(status, f"no model for {KEY}", Location=other.url))
    with pytest.raises(UserError, match="evaluate.judge_key.*SOME_KEY" if status in (401, 403) else "no model") as e:
        ask(server.url)
    assert KEY not in str(e.value)
    assert "\n" not in str(e.value)
    assert (set(server.attempts.values()), other.seen) == ({1}, [])


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_an_error_that_does_not_show_it(serve, monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(UserError, match="SOME_KEY") as e:
        ask(serve(lambda prompt, _: says("1")).url)
    assert key not in str(e.value)


@pytest.mark.parametrize(
    ("status", "refusal", "field", "sent"),
    [
        (400, "max_tokens is not known; use max_completion_tokens", "max_tokens", "max_completion_tokens"),
        (422, "extra field: seed", "seed", None),
        (400, "temperature must be 1", "temperature", None),
        (400, "logprobs are not supported", "logprobs", None),
    ],
)
def test_a_field_that_a_server_refuses_is_left_out_or_renamed_and_that_is_remembered(
    serve, status, refusal, field, sent
):
    fields = {"max_tokens": 3, "seed": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
    server = serve(lambda prompt, _: says("ok"))
    server.refuses = lambda body: fails(status, refusal) if field in body else None
    client = server_at(server.url)
    for prompt in "ab":
        assert dict(client.answers([asked(prompt, **fields)]))[0].text == "ok"
    assert (server.attempts["a"], server.attempts["b"]) == (2, 1)
    assert server.seen[-1][2].get(sent) == (fields[field] if sent else None)
    assert client.concessions == (field,)


def test_the_systems_message_goes_into_the_users_where_the_template_has_no_such_role(serve):
    server = serve(lambda prompt, _: says("ok"))
    server.refuses = lambda body: (
        fails(400, "System role not supported") if body["messages"][0]["role"] == "system" else None
    )
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "this"}]
    assert ask(server.url, {"messages": messages})[0].text == "ok"
    assert server.seen[-1][2]["messages"] == [{"role": "user", "content": "Judge.\n\nthis"}]


def test_a_prompt_that_is_too_long_is_refused_and_nothing_is_remembered(serve):
    server = serve(lambda prompt, _: fails(400, "too long: 900 tokens and max_tokens 5 are more than 512"))
    client = server_at(server.url)
    (answer,) = dict(client.answers([asked("p", max_tokens=5)])).values()
    assert (answer.finish_reason, client.concessions) == ("error", ())
    assert "too long" in answer.error


def test_questions_are_sent_side_by_side_but_never_more_than_asked(serve):
    gate = threading.Barrier(3)

    def answer(prompt, _):
        gate.wait(10)
        return says("1")

    server = serve(answer)
    assert len(ask(server.url, *(asked(str(n)) for n in range(6)), concurrency=3)) == 6
    assert server.most == 3


def test_a_process_that_is_interrupted_waits_for_no_answer(serve):
    threads = []

    def answer(prompt, _):
        threads.extend(t for t in threading.enumerate() if t.name == "chat_server")
        return says("1")

    ask(serve(answer).url)
    assert threads
    assert all(thread.daemon for thread in threads)


THOUGHTS = [
    ("<think>\nIs it 3? No.\n</think>\n\n8||fine", "8||fine"),
    ("<Thinking>3</Thinking><think>4</think>8", "8"),
    ("[THINK]3[/THINK] 8", "8"),
    ("It is 3.\n</think>\n8", "8"),  # of a template that begins the thought
    ("<|channel|>analysis<|message|>3<|end|><|start|>assistant<|channel|>final<|message|>8", "8"),
    ("<think>It is 3, since", ""),
    ("8||it says </think> itself", "8||it says </think> itself"),
    ("<b>8</b>", "<b>8</b>"),
]


@pytest.mark.parametrize(("said", "answer"), THOUGHTS)
def test_a_thought_before_an_answer_is_no_part_of_it(serve, said, answer):
    top = [{"token": said[0], "logprob": -0.1}]
    server = serve(lambda prompt, _: says(said, logprobs={"content": [{"token": said[0], "top_logprobs": top}]}))
    found = ask(server.url)[0]
    assert found.text.strip() == answer
    assert bool(found.alternatives) == (answer == said)


@pytest.mark.parametrize("text", ["<think>" * 30_000, "\n" * 100_000, "<think></think>" * 20_000, " " * 100_000])
def test_a_thought_without_end_is_read_at_once(text):
    begun = time.monotonic()
    without_thought(text)
    assert time.monotonic() - begun < 5


def test_an_answer_in_parts_is_the_text_that_is_no_thought(serve):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "3"}]}, {"type": "text", "text": "8"}]
    assert ask(serve(lambda prompt, _: says(parts)).url)[0].text == "8"


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": float("inf")}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}, [1]]
)
def test_a_count_of_tokens_that_is_none_does_not_spoil_an_answer(serve, usage):
    answer = ask(serve(lambda prompt, _: says("8", usage=usage)).url)[0]
    assert (answer.text, answer.sent) == ("8", 0)


def test_a_byte_that_is_no_text_is_replaced(serve):
    body = b'\xef\xbb\xbf{"choices": [{"message": {"content": "8 \xff"}}]}'
    assert ask(serve(lambda prompt, _: (200, body, {})).url)[0].text == "8 \ufffd"


def test_a_server_that_has_moved_says_where_to(serve):
    server = serve(lambda prompt, _: (307, b"", {"Location": "https://there/v1"}))
    with pytest.raises(UserError, match=r"307 Temporary Redirect: \(moved to https://there/v1; name that URL\)$"):
        ask(server.url)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"choices": [{"message": {"content": "8"}, "logprobs": 3}]}', b"\xff"]
)
def test_an_answer_that_is_none_is_the_questions_own_error_where_others_have_good_ones(serve, body):
    server = serve(lambda prompt, _: (200, body, {}) if prompt == "bad" else says("fine"))
    answers = ask(server.url, asked("bad"), asked("good"), concurrency=1)
    assert [answers[n].finish_reason for n in range(2)] == ["error", "stop"]


def test_one_question_that_a_server_denies_is_an_error_of_its_own(serve):
    """As of a server that looks at what is asked and says 403 to some of it."""
    server = serve(lambda prompt, _: fails(403, "flagged") if prompt == "bad" else says("fine"))
    answers = ask(server.url, asked("good"), asked("bad"), asked("good too"), concurrency=1)
    assert [answers[n].finish_reason for n in range(3)] == ["stop", "error", "stop"]
    assert "flagged" in answers[1].error


def test_a_server_that_goes_on_to_fail_after_good_answers_ends_the_questions(serve):
    server = serve(lambda prompt, _: says("fine") if prompt == "0" else fails(403, "no more"))
    with pytest.raises(UserError, match="no more"):
        ask(server.url, *(asked(str(n)) for n in range(40)), concurrency=1)
    assert len(server.seen) < 12


def test_a_server_that_never_answers_well_is_given_up_after_a_few_questions(serve):
    server = serve(lambda prompt, _: fails(500, "boom"))
    with pytest.raises(UserError, match=r"does not answer, after 3 attempts .*boom"):
        ask(server.url, *(asked(str(n)) for n in range(40)), concurrency=1)
    assert len(server.attempts) <= 3


def test_a_server_that_takes_no_role_says_so_with_500_too(serve):
    server = serve(lambda prompt, _: says("ok"))
    server.refuses = lambda body: (
        fails(500, "Conversation roles must alternate user/assistant") if len(body["messages"]) > 1 else None
    )
    messages = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "this"}]
    assert ask(server.url, {"messages": messages})[0].text == "ok"
    assert len(server.seen) == 2


def test_a_server_that_is_silent_is_given_up_soon(serve):
    silent = threading.Event()
    server = serve(lambda prompt, _: silent.wait(30) and says("late"))
    begun = time.monotonic()
    with pytest.raises(UserError, match="does not answer, after 2 attempts"):
        ask(server.url, timeout=0.3)
    silent.set()
    assert time.monotonic() - begun < 20


def test_an_answer_without_end_is_cut(serve, monkeypatch):
    monkeypatch.setattr(chat_server, "_MOST_BYTES", 1000)
    server = serve(lambda prompt, _: says("x" * 2000) if prompt == "bad" else says("fine"))
    answers = ask(server.url, asked("good"), asked("bad"), concurrency=1)
    assert "an answer of more than 1000 bytes" in answers[1].error


def test_a_server_that_was_there_before_may_be_away_for_a_while(serve, monkeypatch):
    monkeypatch.setattr(chat_server, "PAUSES", (0.2,) * 6)
    server = serve(lambda prompt, _: says(prompt))
    client, address = server_at(server.url, concurrency=1), server.server_address
    assert dict(client.answers([asked("a")]))[0].text == "a"
    server.socket.close()
    back = threading.Timer(0.7, lambda: again.append(restart(address)))
    again = []

    def restart(address):
        other = Server(lambda prompt, _: says(prompt))
        other.socket.close()
        other.socket = socket.create_server(address, reuse_port=False)
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        return other

    server.shutdown()
    back.start()
    assert dict(client.answers([asked("b")]))[0].text == "b"
    back.join()
    again[0].shutdown()
    again[0].server_close()


def test_what_goes_on_is_said_as_it_is(serve):
    for goes_on, words in ((True, "the same command goes on from here"), (False, "run the command again")):
        with pytest.raises(UserError, match=words):
            ask(serve(lambda prompt, _: fails(503)).url, goes_on=goes_on)


def test_a_server_that_wants_a_key_names_the_variable_that_is_not_set(serve, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(UserError, match="asks for an API key, and the environment variable SOME_KEY is not set"):
        ask(serve(lambda prompt, _: fails(401)).url)


def test_the_key_is_in_no_answer_and_in_no_part_of_an_error(serve, monkeypatch):
    key = "sk-" + "k" * 40
    monkeypatch.setenv("SOME_KEY", key)
    assert key not in ask(serve(lambda prompt, _: says(f"8||your key is {key}")).url)[0].text
    # The line is cut in the middle of the key.
    server = serve(lambda prompt, _: fails(400, "x" * 170 + key))
    assert "kkkk" not in ask(server.url)[0].error
