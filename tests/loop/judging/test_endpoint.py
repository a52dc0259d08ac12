"""The judge behind a server, against a stand-in of this machine."""

import pytest
from chat_stand_in import fails, says

from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.loop.judging.endpoint import Endpoint


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


def test_a_server_that_stays_overloaded_is_one_line_and_the_same_command_goes_on(serve):
    server = serve(lambda prompt, _: fails(503, "busy\nnow"))
    with pytest.raises(UserError, match=r"--assess.judge: http.* after 3 attempts \(503 .*busy now\); the same") as e:
        ask(server.url)
    assert "\n" not in str(e.value)


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


def test_a_judge_whose_every_answer_is_cut_before_it_begins_names_the_setting(serve):
    server = serve(lambda prompt, _: says("<think>It is", "length"))
    with pytest.raises(UserError, match=r"^--assess.max_tokens: each of the first 2 answers .* cut at 16 tokens"):
        ask(server.url, ["a", "b"])


def test_some_answers_that_are_cut_are_no_more_than_that(serve):
    server = serve(lambda prompt, _: says(None, "length") if prompt == "a" else says("8"))
    assert [c.text for c in ask(server.url, ["a", "b"])] == ["", "8"]


def test_a_server_that_refuses_everything_from_some_time_on_is_to_blame(serve):
    server = serve(lambda prompt, _: says("8") if int(prompt) < 20 else fails(400, "no such model"))
    with pytest.raises(UserError, match=r"refuses every request: 400 .*no such model"):
        ask(server.url, [str(n) for n in range(1000)])
    assert len(server.seen) < 200
