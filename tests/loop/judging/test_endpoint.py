"""The judge behind a server, against a stand-in of this machine."""

import http.server
import json
import socket
import threading
from collections import Counter

import pytest

from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.loop.judging import endpoint
from isheep_jax.loop.judging.endpoint import Endpoint


class Server(http.server.ThreadingHTTPServer):
    """Answers with what `answer(prompt, attempt)` returns: (status, body, headers)."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.seen, self.attempts = answer, [], Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.attempts[prompt] += 1
            self.server.seen.append((self.path, self.headers, body))
            attempt = self.server.attempts[prompt]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        status, answer, headers = self.server.answer(prompt, attempt)
        with self.server.lock:
            self.server.now -= 1
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def says(text, finish_reason="stop"):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}, {}


def fails(status, message="no", **headers):
    return status, {"error": {"message": message}}, headers


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSES", (0.01, 0.01))
    # As between processes, what the first one found travels as JSON.
    monkeypatch.setattr(endpoint.distributed, "from_primary", lambda make: json.loads(json.dumps(make())))
    servers = []

    def start(answer):
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url, prompts=("p",), at_once=4, seed=0):
    model = Endpoint(url, "big", "JUDGE_KEY", at_once, seed)
    return list(model.generate([Request(f"id {p}", p) for p in prompts], SamplingParams(0.7, 0.9, 16)))


def test_a_request_says_the_model_the_sampling_and_the_prompt_and_its_answer_is_found_by_id(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = serve(lambda prompt, _: says(f" 8||{prompt}", "length" if prompt == "b" else "stop"))
    answers = {c.id: (c.text, c.finish_reason) for c in ask(server.url + "/", ["a", "b"])}
    assert answers == {"id a": (" 8||a", "stop"), "id b": (" 8||b", "length")}
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert {k: body[k] for k in ("model", "temperature", "top_p", "max_tokens")} == {
        **{"model": "big", "temperature": 0.7, "top_p": 0.9, "max_tokens": 16},
    }
    seeds = {b["messages"][-1]["content"]: b["seed"] for _, _, b in server.seen}
    assert seeds["a"] != seeds["b"]


def test_the_seed_of_a_request_follows_from_the_runs_and_its_id(serve):
    server = serve(lambda prompt, _: says("1"))
    for seed in (0, 0, 1):
        ask(server.url, seed=seed)
    first, again, other = (body["seed"] for _, _, body in server.seen)
    assert first == again != other


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    server = serve(lambda prompt, _: says("1"))
    ask(server.url)
    assert server.seen[0][1]["Authorization"] is None


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_another_attempt_may_mend_gets_one(serve, status):
    server = serve(lambda prompt, attempt: says("9") if attempt == 3 else fails(status, **{"Retry-After": "0"}))
    assert [c.text for c in ask(server.url)] == ["9"]
    assert server.attempts["p"] == 3


def test_a_server_that_stays_overloaded_is_one_line_and_the_same_command_goes_on(serve):
    server = serve(lambda prompt, _: fails(503, "busy\nnow"))
    with pytest.raises(UserError, match=r"--assess.judge: http.* after 3 attempts \(503 .*busy now\); the same") as e:
        ask(server.url)
    assert "\n" not in str(e.value)


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSES", (0.01,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"--assess.judge: http://127.0.0.1:{port} does not answer.*refused"):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(("status", "word"), [(401, "--assess.judge_key"), (403, "JUDGE_KEY"), (404, "no such model")])
def test_what_no_attempt_mends_ends_at_once(serve, status, word):
    server = serve(lambda prompt, _: fails(status, "no such model"))
    with pytest.raises(UserError, match=word):
        ask(server.url)
    assert set(server.attempts.values()) == {1}


def test_a_request_that_is_refused_by_itself_is_an_error_of_its_own(serve):
    server = serve(lambda prompt, _: fails(400, "too long") if prompt == "b" else says("5"))
    answers = {c.id: c for c in ask(server.url, ["a", "b", "c"])}
    assert [answers[f"id {p}"].finish_reason for p in "abc"] == ["stop", "error", "stop"]
    assert "too long" in answers["id b"].error


def test_when_all_are_refused_the_server_is_to_blame(serve):
    server = serve(lambda prompt, _: fails(400, "unknown parameter"))
    with pytest.raises(UserError, match=r"refuses every request: 400 .*unknown parameter"):
        ask(server.url, ["a", "b"])


@pytest.mark.parametrize("answer", [b"<html>hello</html>", {"choices": []}, {"choices": [{"text": "9"}]}, []])
def test_another_kind_of_server_is_told_from_its_answer(serve, answer):
    server = serve(lambda prompt, _: (200, answer, {}))
    with pytest.raises(UserError, match="does not answer like an OpenAI-compatible server"):
        ask(server.url)


def test_an_answer_without_text_is_an_empty_one(serve):
    server = serve(lambda prompt, _: says(None))
    assert [c.text for c in ask(server.url)] == [""]


def test_requests_are_sent_side_by_side_but_never_more_than_asked(serve):
    gate = threading.Barrier(3)

    def answer(prompt, _):
        gate.wait(10)
        return says("1")

    server = serve(answer)
    assert len(ask(server.url, [str(n) for n in range(6)], at_once=3)) == 6
    assert server.most == 3
