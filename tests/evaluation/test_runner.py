"""The runner keeps every response, resumes where it was, and asks for nothing twice."""

import dataclasses
import json

import pytest
from etils import epath
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import Completion, SamplingParams, TextLogprob
from isheep_jax.errors import UserError
from isheep_jax.evaluation.figures import Figure
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.evaluation.task import Sample, Score, Task
from isheep_jax.files import write_json
from isheep_jax.loop.protocols import is_fuller
from isheep_jax.text.conversation import Message

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
DECODING = {"chat_template": "some", "compute_dtype": "float32", "seed": 0, "weights": "a"}


def sample(i: int, **fields) -> Sample:
    prompt = (Message("user", f"prompt {i}"),)
    return Sample(str(i), prompt, GREEDY, **{"reference": {"right": i % 2 == 0}, **fields})


def score(pairs, scoring):
    return [Score({"accuracy": s.reference["right"] and not r.error}, {"length": len(r.text)}) for s, r in pairs]


def task(samples, **fields) -> Task:
    return Task("a task", 1, lambda options: samples, score, "accuracy", **fields)


class Killed(Exception):
    """Stands for SIGKILL."""


class Model:
    """Answers with the id and the length of the conversation; finishes in reverse order. kill: after so many."""

    def __init__(self, kill: int | None = None, broken=()):
        self.asked: list[str] = []
        self.sampling: list[SamplingParams] = []
        self._kill, self._broken = kill, broken

    def text_logprobs(self, requests, texts):
        for request, _ in reversed(list(zip(requests, texts, strict=True))):
            if len(self.asked) == self._kill:
                raise Killed
            self.asked.append(request.id)
            yield TextLogprob(request.id, -1.5, 2, logprobs=(-1.0, -0.5))

    def generate(self, requests, sampling):
        self.sampling.append(sampling)
        for request in reversed(requests):
            if len(self.asked) == self._kill:
                raise Killed
            self.asked.append(request.id)
            if request.id in self._broken:
                yield Completion(request.id, "", finish_reason="error", error="the prompt is too long")
            else:
                yield Completion(request.id, f" {request.id} {len(request.prompt)} ", finish_reason="stop")


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path) / "evaluation" / "task"


def evaluator(a_task, decoding=DECODING, **settings) -> TaskEvaluator:
    return TaskEvaluator("task", a_task, EvaluateConfig(**settings), decoding)


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_samples_have_prompt_response_and_scores_in_order(directory):
    result = evaluator(task([sample(i) for i in range(3)]))(Model(), directory, Counting())
    assert lines(directory)[1] == {
        "sample": "1", "attempt": 0, "prompts": ["prompt 1"], "texts": ["evaluate/task/1/0/0 1"],
        "finish_reasons": ["stop"], "error": "", "logprobs": [],
        "values": {"accuracy": False}, "details": {"length": 21},
    }  # fmt: skip
    assert [line["sample"] for line in lines(directory)] == ["0", "1", "2"]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["figures"]["accuracy"] == {"value": pytest.approx(2 / 3), "stderr": pytest.approx(1 / 3), "count": 3}
    assert not (directory / "partial").exists()


@pytest.mark.parametrize("kill", [0, 31, 32, 70, 99])
def test_killed_evaluation_goes_on_and_ends_the_same(directory, tmp_path, kill):
    a_task = task([sample(i) for i in range(100)])
    whole = evaluator(a_task)(Model(), epath.Path(tmp_path) / "whole", Counting())
    with pytest.raises(Killed):
        evaluator(a_task)(Model(kill), directory, Counting())
    rest, progress = Model(), Counting()
    assert evaluator(a_task)(rest, directory, progress) == whole
    assert len(rest.asked) == 100 - kill // 32 * 32
    assert progress.opened == [["", 100, "responses", 100]]
    assert (directory / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("kill", [5, 40])
def test_killed_reading_of_given_responses_goes_on_and_ends_the_same(directory, tmp_path, kill):
    a_task = task([sample(i, given=f"answer {i}") for i in range(50)])
    whole = evaluator(a_task)(Model(), epath.Path(tmp_path / "whole"), Counting())
    with pytest.raises(Killed):
        evaluator(a_task)(Model(kill), directory, Counting())
    rest = Model()
    assert evaluator(a_task)(rest, directory, Counting()) == whole
    assert len(rest.asked) == 50 - kill // 32 * 32
    assert (directory / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert lines(directory)[7]["texts"] == ["answer 7"]
    assert lines(directory)[7]["logprobs"] == [-1.0, -0.5]
    assert whole["examples"] == []


def test_changed_given_response_is_refused(directory):
    evaluator(task([sample(0, given="an answer")]))(Model(), directory, Counting())
    with pytest.raises(UserError, match="references was"):
        evaluator(task([sample(0, given="another")]))(Model(), directory, Counting())


def test_finished_evaluation_asks_nothing(directory):
    a_task = evaluator(task([sample(i) for i in range(4)]))
    result, again = a_task(Model(), directory, Counting()), Model()
    assert a_task(again, directory, Counting()) == result
    assert again.asked == []


def test_higher_limit_asks_only_for_what_is_missing(directory):
    a_task = task([sample(i) for i in range(20)])
    few = evaluator(a_task, limit=5)(Model(), directory, Counting())
    assert (few["count"], few["of"], len(lines(directory))) == (5, 20, 5)
    more = Model()
    result = evaluator(a_task)(more, directory, Counting())
    assert (len(more.asked), result["count"]) == (15, 20)
    fewer_again = Model()
    assert evaluator(a_task, limit=5)(fewer_again, directory, Counting()) == few
    assert fewer_again.asked == []
    assert [line["values"] != {} for line in lines(directory)].count(True) == 5  # the others have no scores


def test_limit_draws_the_same_samples_wherever_they_stand(tmp_path):
    def drawn(samples):
        directory = epath.Path(tmp_path) / str(len(list(tmp_path.iterdir())))
        evaluator(task(samples), limit=7)(Model(), directory, Counting())
        return {line["sample"] for line in lines(directory)}

    samples = [sample(i) for i in range(50)]
    assert drawn(samples) == drawn(samples[::-1])
    assert drawn(samples) != {str(i) for i in range(7)}


def test_only_a_task_in_random_order_is_limited_to_its_first_samples(directory):
    evaluator(task([sample(i) for i in range(50)], random_order=True), limit=7)(Model(), directory, Counting())
    assert [line["sample"] for line in lines(directory)] == list("0123456")


@pytest.mark.parametrize(
    ("name", "other"),
    [("seed", {"decoding": {**DECODING, "seed": 1}}), ("weights", {"decoding": {**DECODING, "weights": "b"}})],
)
def test_other_settings_are_refused_and_named(directory, name, other):
    samples = [sample(i) for i in range(3)]
    evaluator(task(samples))(Model(), directory, Counting())
    with pytest.raises(UserError, match=rf"other settings: {name} was .*; remove it, or .* --output"):
        evaluator(task(samples), **other)(Model(), directory, Counting())


def test_changed_prompt_is_refused(directory):
    evaluator(task([sample(0)]))(Model(), directory, Counting())
    changed = [dataclasses.replace(sample(0), prompt=(Message("user", "another"),))]
    with pytest.raises(UserError, match="prompts was"):
        evaluator(task(changed))(Model(), directory, Counting())


def test_result_is_current_until_settings_or_limit_change(directory):
    a_task = task([sample(i) for i in range(5)], scoring_settings=("judge",))
    result = json.loads(json.dumps(evaluator(a_task)(Model(), directory, Counting())))
    assert evaluator(a_task).is_current(result)
    assert evaluator(a_task, limit=9).is_current(result)
    for changed in ({"limit": 3}, {"judge": "x"}, {"decoding": {**DECODING, "compute_dtype": "bfloat16"}}):
        assert not evaluator(a_task, **changed).is_current(result)


def test_other_scoring_scores_the_kept_responses_again(directory):
    a_task = task([sample(i) for i in range(5)], scoring_settings=("judge",))
    evaluator(a_task)(Model(), directory, Counting())
    again = Model()
    assert evaluator(a_task, judge="x")(again, directory, Counting())["scoring"] == {"judge": "x"}
    assert again.asked == []


def test_later_turns_follow_the_answers(directory):
    samples = [sample(0, later_turns=("and then?",)), sample(1)]
    evaluator(task(samples))(Model(), directory, Counting())
    first, second = lines(directory)
    assert first["prompts"] == ["prompt 0", "and then?"]
    assert first["texts"] == ["evaluate/task/0/0/0 1", "evaluate/task/0/0/1 3"]
    assert second["texts"] == ["evaluate/task/1/0/0 1"]


def test_prompt_that_cannot_be_answered_ends_its_talk_and_is_counted(directory):
    samples = [sample(0, later_turns=("and then?",)), sample(1)]
    progress = Counting()
    result = evaluator(task(samples))(Model(broken=["evaluate/task/0/0/0"]), directory, progress)
    assert lines(directory)[0] | {"values": None, "details": None} == {
        "sample": "0", "attempt": 0, "prompts": ["prompt 0", "and then?"], "texts": ["", ""],
        "finish_reasons": ["error", "error"], "error": "the prompt is too long", "logprobs": [],
        "values": None, "details": None,
    }  # fmt: skip
    assert (result["unanswered"], result["accuracy"]) == (1, 0.0)
    assert progress.opened == [["", 3, "responses", 3]]


def test_samples_are_asked_with_their_own_sampling(directory):
    warm = SamplingParams(temperature=0.7, max_tokens=8)
    model = Model()
    samples = [sample(0), dataclasses.replace(sample(1), sampling=warm), sample(2)]
    result = evaluator(task(samples))(model, directory, Counting())
    assert model.sampling == [GREEDY, warm]
    assert [s["temperature"] for s in result["settings"]["sampling"]] == [0.0, 0.7]


def test_attempts_are_asked_apart_and_clustered(directory):
    result = evaluator(task([sample(i, attempts=3) for i in range(4)]))(Model(), directory, Counting())
    kept = [(line["sample"], line["attempt"]) for line in lines(directory)]
    assert kept == [(str(i), attempt) for i in range(4) for attempt in range(3)]
    # All attempts of a sample have the same score, so that there are four independent values, not twelve.
    assert result["figures"]["accuracy"] == {"value": 0.5, "stderr": pytest.approx((1 / 12) ** 0.5), "count": 12}
    assert result["count"] == 4


def test_groups_have_figures_and_examples_of_their_own(directory):
    samples = [sample(i, groups={"kind": "even" if i % 2 == 0 else "odd"}) for i in range(6)]
    result = evaluator(task(samples))(Model(), directory, Counting())
    assert {kind: figure["value"] for kind, figure in result["groups"]["kind"].items()} == {"even": 1.0, "odd": 0.0}
    assert [(e["instruction"], e["correct"]) for e in result["examples"]] == [("prompt 0", True), ("prompt 1", False)]


def test_figures_of_the_task_stand_beside_the_means(directory):
    def figures(triples):
        return {"pass@2": Figure(len(triples) / 10, 0.0, len(triples))}

    result = evaluator(task([sample(i) for i in range(3)], figures=figures))(Model(), directory, Counting())
    assert set(result["figures"]) == {"accuracy", "pass@2"}
    assert result["figures"]["pass@2"]["value"] == 0.3


def test_text_prompts_are_kept_as_they_are(directory):
    class Continues:
        def generate(self, requests, sampling):
            for request in requests:
                yield Completion(request.id, "  x\n")

    evaluator(task([dataclasses.replace(sample(0), prompt="Q:")]))(Continues(), directory, Counting())
    assert lines(directory)[0]["texts"] == ["  x\n"]


def test_damaged_samples_are_named(directory):
    a_task = evaluator(task([sample(0)]))
    a_task(Model(), directory, Counting())
    (directory / "samples.jsonl").write_text('{"sample": "0"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged"):
        a_task(Model(), directory, Counting())


def test_chat_prompts_need_a_template(directory):
    bare = evaluator(task([sample(0)]), {**DECODING, "chat_template": ""}, prompt_format="chat")
    with pytest.raises(UserError, match=r"--evaluate\.prompt_format: chat needs a chat template"):
        bare(Model(), directory, Counting())


def test_any_text_can_be_written(directory):
    class Odd(Model):
        def generate(self, requests, sampling):
            for request in requests:
                yield Completion(request.id, "a\ud800b", finish_reason="stop")

    def scored(pairs, scoring):
        return [Score({"accuracy": True}, {"reason": "\udfff"}) for _ in pairs]

    result = evaluator(dataclasses.replace(task([sample(0)]), score=scored))(Odd(), directory, Counting())
    write_json(directory / "evaluation.json", result)
    (line,) = lines(directory)
    assert (line["texts"], line["details"]) == (["a?b"], {"reason": "?"})
    assert json.loads((directory / "evaluation.json").read_text())["examples"][0]["response"] == "a?b"


def test_a_look_at_fewer_samples_leaves_the_fuller_result(directory):
    a_task = task([sample(i) for i in range(20)])
    full = evaluator(a_task)(Model(), directory, Counting())
    before = (directory / "samples.jsonl").read_bytes()
    few = evaluator(a_task, limit=5)(Model(), directory, Counting(), full)
    assert few["count"] == 5
    assert is_fuller(full, few)
    assert (directory / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["samples.jsonl", "partial"])
def test_responses_to_unknown_prompts_are_refused(directory, name):
    a_task = evaluator(task([sample(0)]))
    a_task(Model(), directory, Counting())
    (directory / "settings.json").unlink()
    if name == "partial":
        (directory / "samples.jsonl").rename(directory / name)
    with pytest.raises(UserError, match=r"settings\.json is missing"):
        a_task(Model(), directory, Counting())


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b'{"sample": "0", "attempt": 0, "prompts": ["x"], "texts": [], "finish_reasons": []}\n',
        b"[1]\n",
    ],
)
def test_other_damage_is_named_too(directory, line):
    a_task = evaluator(task([sample(0)]))
    a_task(Model(), directory, Counting())
    (directory / "samples.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged"):
        a_task(Model(), directory, Counting())


def test_another_sampling_is_named_by_what_differs(directory):
    evaluator(task([sample(0)]))(Model(), directory, Counting())
    longer = [dataclasses.replace(sample(0), sampling=dataclasses.replace(GREEDY, max_tokens=9))]
    with pytest.raises(UserError, match=r"other settings: max_tokens was \[8\], now \[9\]; remove it"):
        evaluator(task(longer))(Model(), directory, Counting())
