"""Asking a judge: each question once, over kills and failures, and what is kept on the disk."""

import contextlib
import itertools
import json
import threading
import time
import zlib

import pytest
from chat_stand_in import fails, says
from etils import epath
from judged import LocalJudge, Writer, write_data
from memory_bucket import memory_bucket
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation import judging
from isheep_jax.evaluation.judging import Question, Verdict, _KeptVerdicts, ask_judge, check_judge
from isheep_jax.evaluation.task import JudgeModel, Scoring
from isheep_jax.evaluation.tasks import evaluators
from isheep_jax.text.conversation import Message

KEY = "sk-not-to-be-seen"


class Killed(BaseException):
    """Stands for a kill; nothing in the program may catch it."""


class Bar:
    """Progress that ends the process after so many verdicts."""

    def __init__(self, killed_after=None):
        self.killed_after, self.done, self.notes, self.opened = killed_after, 0, {}, []

    @contextlib.contextmanager
    def __call__(self, what, total, unit):
        self.opened.append((what, total, unit))
        yield self

    def advance(self, n=1, **notes):
        self.done += n
        self.notes |= notes
        if self.done == self.killed_after:
            raise Killed


def question(text, **fields):
    fields = {"choices": ("yes", "no"), "max_tokens": 9, **fields}
    return Question((Message("system", "Judge."), Message("user", text)), **fields)


def scoring(directory, url="", judge=None, bar=None, **settings):
    settings = {"judge": url or "some/model", "judge_model": "big", "judge_key": "THE_KEY", **settings}
    return Scoring(EvaluateConfig(**settings), epath.Path(directory), bar or Bar(), JudgeModel(lambda: judge, "digest"))


def ask(texts, scoring, is_readable=lambda question, verdict: "?" not in verdict.text):
    return ask_judge([question(text) for text in texts], scoring, is_readable)


def everything_in(directory):
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_a_server_gets_messages_and_parameters_and_equal_questions_are_asked_once(serve, tmp_path):
    server = serve(lambda prompt, _: says(f"about {prompt}", usage={"prompt_tokens": 100, "completion_tokens": 7}))
    bar = Bar()
    verdicts = ask(["a", "b", "a"], scoring(tmp_path, server.url, bar=bar))
    assert [v.text for v in verdicts] == ["about a", "about b", "about a"]
    assert server.attempts == {"a": 1, "b": 1}
    body = next(body for *_, body in server.seen if body["messages"][1]["content"] == "a")
    assert body == {
        "model": "big",
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "a"}],
        "temperature": 0.0,
        "max_tokens": 9,
    }
    assert (bar.opened, bar.done) == ([("judge", 2, "verdicts")], 2)
    assert bar.notes == {"tokens_sent": 200, "tokens_received": 14}
    facts = json.loads((tmp_path / "judging.json").read_text())
    assert facts == {
        "judge": server.url, "model": "big", "left_out": [], "verdicts": 2, "refused": 0, "tokens_sent": 200,
        "tokens_received": 14,
    }  # fmt: skip


def test_faults_of_a_server_lose_no_verdict_and_the_key_is_nowhere(serve, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("THE_KEY", KEY)
    whole = json.dumps(says("cut")[1]).encode()

    def answer(prompt, attempt):
        if attempt == 1:
            faults = {
                0: fails(429, f"slow down, {KEY}"),
                1: fails(503),
                2: (200, b"<html>", {}),
                3: (200, whole, {"Content-Length": "9999"}),
            }
            return faults[int(prompt) % 4]
        return fails(429) if attempt == 2 else says(f"about {prompt}")

    server = serve(answer)
    texts = [str(n) for n in range(40)]
    verdicts = ask(texts, scoring(tmp_path, server.url))
    assert [v.text for v in verdicts] == [f"about {text}" for text in texts]
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {f"Bearer {KEY}"}
    assert KEY.encode() not in everything_in(tmp_path)
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("task", ["alpaca_eval", "mt_bench"])
def test_late_malformed_and_refused_answers_change_no_figure(serve, tmp_path, monkeypatch, task):
    monkeypatch.setattr(judging, "_TIMEOUT", 0.3)
    monkeypatch.setenv("THE_KEY", KEY)
    late = threading.Event()
    turns = itertools.count()

    def well(prompt, _):
        n = 1 + zlib.crc32(prompt.encode()) % 10
        return says(f"Rating: [[{n}]]" if task == "mt_bench" else "AB"[n % 2])

    def badly(prompt, attempt):
        if attempt == 1:
            turn = next(turns) % 5
            if turn == 0:
                late.wait(5)
            return [well(prompt, 1), fails(429), (200, b"{}", {}), (200, b"<html>", {}), fails(502)][turn]
        late.set()
        return fails(429) if attempt == 2 else well(prompt, attempt)

    results = []
    for name, answer in (("well", well), ("badly", badly)):
        server = serve(answer)
        settings = EvaluateConfig(
            tasks=(task,), task_data=str(write_data(tmp_path / "data")), judge=server.url, judge_model="big",
            judge_key="THE_KEY",
        )  # fmt: skip
        directory = epath.Path(tmp_path / name / "evaluation" / task)
        results.append(
            evaluators(settings, {"chat_template": "chatml", "weights": "w"})[task](Writer(), directory, Counting())
        )
    assert len(server.seen) > len(server.attempts) == 6
    assert results[0]["figures"] == results[1]["figures"]
    assert results[0]["figures"]["unparsed"]["value"] == 0.0
    assert KEY.encode() not in everything_in(tmp_path)


@pytest.mark.parametrize("killed_after", [1, 5, 64, 70])
def test_a_judging_that_was_killed_asks_nothing_again_that_it_has_shown(serve, tmp_path, killed_after):
    server = serve(lambda prompt, _: says(f"about {prompt}", usage={"prompt_tokens": 10}))
    texts = [f"question {n}" for n in range(80)]
    with pytest.raises(Killed):
        ask(texts, scoring(tmp_path, server.url, bar=Bar(killed_after), judge_requests=1))
    kept = [json.loads(line) for path in sorted(tmp_path.glob("verdicts/part-*")) for line in path.open()]
    assert len(kept) == killed_after
    time.sleep(0.05)  # what was under way at the kill arrives
    before = server.attempts.copy()
    bar = Bar()
    verdicts = ask(texts, scoring(tmp_path, server.url, bar=bar))
    assert [v.text for v in verdicts] == [f"about {text}" for text in texts]
    assert all((server.attempts - before)[v["text"].removeprefix("about ")] == 0 for v in kept)
    assert (bar.done, bar.notes["tokens_sent"]) == (80, 800)
    before = server.attempts.copy()
    assert ask(texts, scoring(tmp_path, server.url)) == verdicts
    assert server.attempts == before


def test_a_server_that_fails_for_good_leaves_what_it_has_said(serve, tmp_path):
    server = serve(lambda prompt, _: says(prompt) if prompt < "question 3" else fails(503, "down"))
    texts = [f"question {n}" for n in range(6)]
    with pytest.raises(UserError, match=r"--evaluate.judge: .*does not answer.*goes on from here"):
        ask(texts, scoring(tmp_path, server.url, judge_requests=1))
    server.answer = lambda prompt, _: says(f"{prompt} at last")
    verdicts = ask(texts, scoring(tmp_path, server.url))
    assert [v.text for v in verdicts] == [*texts[:3], *(f"{text} at last" for text in texts[3:])]


def test_another_judge_model_or_parameter_is_asked_anew(serve, tmp_path):
    server = serve(lambda prompt, _: says(prompt))
    ask(["a"], scoring(tmp_path, server.url))
    ask(["a"], scoring(tmp_path, server.url, judge_model="bigger"))
    ask_judge([question("a", max_tokens=10)], scoring(tmp_path, server.url), lambda *_: True)
    assert server.attempts["a"] == 3
    ask(["a"], scoring(tmp_path, server.url))
    assert server.attempts["a"] == 3


def test_a_refused_question_is_an_error_of_its_own_and_is_asked_again_the_next_time(serve, tmp_path):
    server = serve(lambda prompt, attempt: fails(400, "too long") if (prompt, attempt) == ("b", 1) else says(prompt))
    first, second = (ask("abc", scoring(tmp_path, server.url)) for _ in range(2))
    assert ["too long" in v.error for v in first] == [False, True, False]
    assert [v.text for v in second] == ["a", "b", "c"]
    assert server.attempts == {"a": 1, "b": 2, "c": 1}


def test_verdicts_of_any_text_are_kept(tmp_path):
    _KeptVerdicts(epath.Path(tmp_path)).add({"key": Verdict("A \ud83d", ({"\ud83d": -0.5},))})
    assert _KeptVerdicts(epath.Path(tmp_path)).verdicts == {"key": Verdict("A ?", ({"?": -0.5},))}


def test_a_thought_is_no_part_of_the_verdict(serve, tmp_path):
    server = serve(lambda prompt, _: says("<think>\nmaybe [[3]]\n</think>\n\n[[8]]", logprobs={"content": []}))
    assert ask("a", scoring(tmp_path, server.url))[0].text == "[[8]]"


def test_a_judge_that_cannot_be_read_is_not_paid_to_the_end_and_is_asked_again_once_it_is_mended(serve, tmp_path):
    server = serve(lambda prompt, _: says("<think>hm?"))
    texts = [f"question {n}" for n in range(100)]

    def readable(question, verdict):
        return bool(verdict.text)

    with pytest.raises(UserError, match="none of the first 20 verdicts can be read"):
        ask(texts, scoring(tmp_path, server.url, judge_requests=2), readable)
    assert server.attempts.total() < 40
    server.answer = lambda prompt, _: says("fine")
    assert {v.text for v in ask(texts, scoring(tmp_path, server.url), readable)} == {"fine"}


def test_some_unreadable_verdicts_are_kept_like_others(serve, tmp_path):
    server = serve(lambda prompt, _: says("?" if prompt in "abc" else "fine"))
    for _ in range(2):
        assert [v.text for v in ask("abcd", scoring(tmp_path, server.url, judge_requests=1))] == ["?", "?", "?", "fine"]
    assert set(server.attempts.values()) == {1}


def test_a_bucket_gets_verdicts_together_and_all_of_them_when_a_judging_fails(serve, monkeypatch):
    monkeypatch.setattr(judging, "_SECONDS_IN_BUCKETS", 1000.0)
    written = []
    write = judging.write_atomically
    monkeypatch.setattr(judging, "write_atomically", lambda path, data: (written.append(path.name), write(path, data)))
    bucket = memory_bucket(monkeypatch) / "task"
    server = serve(lambda prompt, _: says(prompt) if prompt < "question 3" else fails(402, "gone"))
    texts = [f"question {n}" for n in range(6)]
    with pytest.raises(UserError, match="gone"):
        ask(texts, scoring(bucket, server.url, judge_requests=1))
    assert written == ["part-00000.jsonl"] * 2
    server.answer = lambda prompt, _: says(prompt)
    assert [v.text for v in ask(texts, scoring(bucket, server.url))] == texts
    assert [server.attempts[text] for text in texts] == [1, 1, 1, 2, 1, 1]


def test_a_damaged_file_of_verdicts_is_named(serve, tmp_path):
    server = serve(lambda prompt, _: says(prompt))
    ask("a", scoring(tmp_path, server.url))
    (tmp_path / "verdicts" / "part-00000.jsonl").write_text('{"key": "x"')
    with pytest.raises(UserError, match=r"part-00000.jsonl does not hold verdicts.*remove it"):
        ask("a", scoring(tmp_path, server.url))


@pytest.mark.parametrize("has_template", [True, False])
def test_a_local_judge_gives_the_probabilities_of_the_choices_and_goes_on_after_a_kill(tmp_path, has_template):
    judge = LocalJudge(lambda prompt, choices: [-float(len(choice)) for choice in choices], has_template)
    with pytest.raises(Killed):
        ask("abcd", scoring(tmp_path, judge=judge, bar=Bar(2)))
    verdicts = ask("abcd", scoring(tmp_path, judge=judge))
    assert len(judge.prompts) == 4
    # A text goes on with a space.
    assert [tuple(v.logprobs) for v in verdicts] == [(-3.0, -2.0) if has_template else (-4.0, -3.0)] * 4
    prompt = (Message("system", "Judge."), Message("user", "d")) if has_template else "Judge.\n\nd\n\nVerdict:"
    assert prompt in judge.prompts
    assert ask("abcd", scoring(tmp_path)) == verdicts  # nothing is left to load a judge for


def test_a_server_needs_the_name_of_a_model():
    check_judge(EvaluateConfig(judge="some/model"))
    with pytest.raises(UserError, match=r"--evaluate\.judge_model"):
        check_judge(EvaluateConfig(judge="http://localhost:1/v1"))
