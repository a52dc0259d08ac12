"""AlpacaEval: the official file, both judges from end to end, and how a choice is read."""

import json
import math
from pathlib import Path

import pytest
from chat_stand_in import fails, says
from etils import epath
from judged import INSTRUCTIONS, LocalJudge, Writer, write_data
from published import published
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.alpaca_eval import DATA, TASK, probability_of_a
from isheep_jax.evaluation.judging import Verdict
from isheep_jax.evaluation.task import JudgeModel, TaskOptions
from isheep_jax.evaluation.tasks import evaluators


def evaluate(directory, model=None, judge_with=None, template="chatml", **settings):
    """Returns the result of the task in directory/runs/x/iteration_2, by the runner."""
    settings = EvaluateConfig(tasks=("alpaca_eval",), task_data=str(write_data(Path(directory) / "data")), **settings)
    decoding = {"chat_template": template, "weights": "w"}
    judge = judge_with and JudgeModel(lambda: judge_with, "digest")
    evaluator = evaluators(settings, decoding, judge)["alpaca_eval"]
    return evaluator(model or Writer(), task_directory(directory), Counting())


def task_directory(directory):
    return epath.Path(directory) / "runs" / "x" / "iteration_2" / "evaluation" / "alpaca_eval"


def values(directory, name):
    return [json.loads(line)["values"].get(name) for line in (task_directory(directory) / "samples.jsonl").open()]


def judged_by(preferences):
    """A server that says A with the given probability that the model's response is preferred, by instruction."""

    def answer(prompt, _):
        (p,) = (p for text, p in preferences.items() if text in prompt)
        own_is_a = prompt.index("answer to") < prompt.index("Reference")
        p = p if own_is_a else 1 - p
        top = [{"token": t, "logprob": math.log(q)} for t, q in (("A", p), (" B", 1 - p), ("?", 1e-9)) if q]
        return says("A" if p > 0.5 else "B", logprobs={"content": [{"token": "A", "top_logprobs": top}]})

    return answer


def test_the_official_file_has_its_four_fields_in_the_order_of_the_instructions(tmp_path):
    result = evaluate(tmp_path)
    rows = json.loads((task_directory(tmp_path) / "model_outputs.json").read_text())
    assert rows == [
        {
            "dataset": "koala" if n else "oasst",
            "instruction": instruction,
            "output": f"answer to evaluate/alpaca_eval/{n}/0/0",
            "generator": "x-iteration_2",
        }
        for n, instruction in enumerate(INSTRUCTIONS)
    ]
    assert result["figures"].keys() == {"length"}
    assert "accuracy" not in result


def test_responses_are_greedy_up_to_2048_tokens_unless_the_settings_say_less(tmp_path):
    data = write_data(tmp_path)
    for settings, tokens in (({}, 2048), ({"max_tokens": 9}, 9)):
        samples = TASK.samples(TaskOptions(EvaluateConfig(task_data=str(data), **settings)))
        assert {(s.sampling.temperature, s.sampling.max_tokens) for s in samples} == {(0.0, tokens)}


def test_a_model_without_a_template_continues_a_text_that_ends_where_the_response_begins(tmp_path):
    model = Writer()
    evaluate(tmp_path, model, template="")
    request, sampling = model.asked[0]
    assert request.prompt == "Instruction:\nName a river.\n\nResponse:\n"
    assert sampling.stop == ("\nInstruction:",)


def test_a_server_judges_both_orders_and_the_win_rate_is_the_mean_preference(serve, tmp_path):
    preferences = dict(zip(INSTRUCTIONS, (0.9, 0.5, 0.1)))
    server = serve(judged_by(preferences))
    result = evaluate(tmp_path, judge=server.url, judge_model="big")
    figures = result["figures"]
    assert values(tmp_path, "win_rate") == [pytest.approx(p) for p in preferences.values()]
    assert figures["win_rate"]["value"] == result["accuracy"] == pytest.approx(0.5)
    # Standard deviation .4 with n - 1, over the root of 3.
    assert figures["win_rate"]["stderr"] == result["stderr"] == pytest.approx(0.4 / math.sqrt(3))
    assert figures["unparsed"] == {"value": 0.0, "stderr": 0.0, "count": 6}
    assert 0 < figures["lc_win_rate"]["value"] < 1
    assert result["groups"]["dataset"]["koala"]["value"] == pytest.approx(0.3)
    assert len(server.seen) == 6
    body = server.seen[0][2]
    assert {k: body[k] for k in ("model", "temperature", "logprobs", "top_logprobs")} == {
        "model": "big", "temperature": 0.0, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip


def test_a_judge_that_always_takes_the_first_response_makes_draws(serve, tmp_path):
    server = serve(lambda prompt, _: says("A"))
    evaluate(tmp_path, judge=server.url, judge_model="big")
    assert values(tmp_path, "win_rate") == [0.5, 0.5, 0.5]


def test_verdicts_that_cannot_be_read_or_had_are_draws_and_are_counted(serve, tmp_path):
    def answer(prompt, attempt):
        if "Name a river." in prompt:
            return says("Both are fine.")
        if "{moon}" in prompt:
            return fails(400, "too long")
        return says("A" if prompt.index("answer to") < prompt.index("Reference") else "B")

    result = evaluate(tmp_path, judge=serve(answer).url, judge_model="big")
    assert values(tmp_path, "win_rate") == [0.5, 0.5, 1.0]
    unparsed = result["figures"]["unparsed"]
    assert (unparsed["value"], unparsed["count"]) == (pytest.approx(4 / 6), 6)
    details = [json.loads(line)["details"] for line in (task_directory(tmp_path) / "samples.jsonl").open()]
    assert details[0] == {"preferences": [None, None], "verdicts": ["Both are fine."] * 2}
    assert "too long" in details[1]["verdicts"][0]


def test_an_instruction_that_could_not_be_answered_is_lost_without_a_question(serve, tmp_path):
    server = serve(lambda prompt, _: says("A"))
    model = Writer(too_long={"evaluate/alpaca_eval/1/0/0"})
    result = evaluate(tmp_path, model, judge=server.url, judge_model="big")
    assert values(tmp_path, "win_rate") == [0.5, 0.0, 0.5]
    assert (len(server.seen), result["unanswered"]) == (4, 1)
    assert json.loads((task_directory(tmp_path) / "model_outputs.json").read_text())[1]["output"] == ""


def test_a_local_judge_compares_in_both_orders(tmp_path):
    def prefer(prompt, choices):
        assert choices == ("A", "B")
        text = prompt[-1].content
        own_is_a = text.index("answer to") < text.index("Reference")
        return [math.log(p) - 7 for p in ((0.8, 0.2) if own_is_a else (0.4, 0.6))]

    judge = LocalJudge(prefer)
    evaluate(tmp_path, judge_with=judge, judge="some/model")
    assert values(tmp_path, "win_rate") == [pytest.approx(0.7)] * 3
    assert len(judge.prompts) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 1.0),
        ("b", 0.0),
        (" **B**", 0.0),
        ("(A)", 1.0),
        ("Response B.", 0.0),
        ("My choice", None),
        ("Choice: A", 1.0),
        ("The answer", None),
        ("Answer: B, because", 0.0),
        ("B is better", 0.0),
        ("A good response", None),
        ("Apples", None),
        ("A or B", None),
        ("", None),
    ],
)
def test_a_choice_is_a_letter_that_begins_the_text(text, expected):
    assert probability_of_a(Verdict(text)) == expected


def test_probabilities_are_read_where_the_letters_have_most_of_them():
    def verdict(*tokens):
        return Verdict("B", tuple({t: math.log(p) for t, p in top.items()} for top in tokens))

    assert probability_of_a(verdict({"A": 0.6, "B": 0.2, " A": 0.1})) == pytest.approx(7 / 9)
    assert probability_of_a(verdict({" ": 0.9, "A": 0.1}, {"A": 0.3, "B": 0.5})) == pytest.approx(3 / 8)
    assert probability_of_a(verdict({"A": 1.0})) == 1.0
    assert probability_of_a(verdict({"Well": 0.9, "A": 0.1})) == 0.0  # by its text
    assert probability_of_a(Verdict(logprobs=(-1000.0, -1001.0))) == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("text", ["{}", '[{"instruction": "a"}]', "[1]", "no"])
def test_a_file_of_another_kind_is_named(tmp_path, text):
    path = write_data(tmp_path) / DATA
    path.write_text(text)
    with pytest.raises(UserError, match=r"gpt4_1106_preview_outputs\.json.* (is not AlpacaEval|should be)"):
        TASK.samples(TaskOptions(EvaluateConfig(task_data=str(tmp_path))))


def test_the_published_file_has_805_instructions_which_nothing_may_train_on():
    settings = EvaluateConfig(task_data=str(published(DATA).parents[1]))
    samples = TASK.samples(TaskOptions(settings))
    assert len(samples) == len({s.held_out for s in samples}) == 805
    assert {s.groups["dataset"] for s in samples} == {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}
