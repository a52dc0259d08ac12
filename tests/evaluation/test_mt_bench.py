"""MT-Bench: the official answer file, the judge's prompts turn by turn, ratings, and what cannot be read."""

import json
import math
from pathlib import Path

import pytest
from chat_stand_in import fails, says
from etils import epath
from judged import TALKS, LocalJudge, Writer, write_data
from published import published
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.judging import Verdict
from isheep_jax.evaluation.mt_bench import CHOICES, PROMPTS, QUESTIONS, REFERENCES, TASK, rating
from isheep_jax.evaluation.task import JudgeModel, TaskOptions
from isheep_jax.evaluation.tasks import evaluators


def evaluate(directory, model=None, judge_with=None, **settings):
    """Returns the result of the task in directory/out, by the runner."""
    settings = EvaluateConfig(tasks=("mt_bench",), task_data=str(write_data(Path(directory) / "data")), **settings)
    decoding = {"chat_template": "chatml", "weights": "w"}
    judge = judge_with and JudgeModel(lambda: judge_with, "digest")
    evaluator = evaluators(settings, decoding, judge)["mt_bench"]
    return evaluator(model or Writer(), task_directory(directory), Counting())


def task_directory(directory):
    return epath.Path(directory) / "out" / "evaluation" / "mt_bench"


def by_server(server):
    return {"judge": server.url, "judge_model": "big"}


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_the_official_file_has_both_turns_of_each_talk(tmp_path):
    evaluate(tmp_path)
    rows = lines(task_directory(tmp_path) / "model_answer" / "out.jsonl")
    assert [row["question_id"] for row in rows] == [81, 111, 150]
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == {
            "question_id": int, "answer_id": str, "model_id": str, "choices": list, "tstamp": float,
        }  # fmt: skip
        id = f"answer to evaluate/mt_bench/{row['question_id']}/0"
        assert row["choices"] == [{"index": 0, "turns": [f"{id}/0", f"{id}/1"]}]
    assert len({row["answer_id"] for row in rows}) == 3


def test_the_second_turn_follows_the_answer_to_the_first_at_the_categorys_temperature(tmp_path):
    model = Writer()
    evaluate(tmp_path, model)
    second = next(request for request, _ in model.asked if request.id == "evaluate/mt_bench/81/0/1")
    assert [(m.role, m.content) for m in second.prompt] == [
        ("user", "Write about {rain}."),
        ("assistant", "answer to evaluate/mt_bench/81/0/0"),
        ("user", "Now in one line."),
    ]
    assert {r.id.split("/")[2]: (s.temperature, s.max_tokens) for r, s in model.asked} == {
        "81": (0.7, 1024), "111": (0.0, 1024), "150": (0.1, 1024),
    }  # fmt: skip


def test_each_turn_is_asked_about_with_the_benchmarks_prompts_and_the_reference_of_math(serve, tmp_path):
    server = serve(lambda prompt, _: says("Rating: [[5]]"))
    evaluate(tmp_path, **by_server(server))
    asked = {body["messages"][1]["content"]: body for *_, body in server.seen}
    answers = {n: [f"answer to evaluate/mt_bench/{n}/0/{turn}" for turn in (0, 1)] for n in TALKS}
    assert asked.keys() == {
        f"one: Write about {{rain}}. answer: {answers[81][0]}",
        f"two: Write about {{rain}}. Now in one line. answers: {answers[81][0]} | {answers[81][1]}",
        f"one: What is 2 + 3? right: It is 5. answer: {answers[111][0]}",
        f"two: What is 2 + 3? And twice that? right: It is 5. answers: {answers[111][0]} | {answers[111][1]}",
        f"one: Why is ice slippery? answer: {answers[150][0]}",
        f"two: Why is ice slippery? And glass? answers: {answers[150][0]} | {answers[150][1]}",
    }
    math_body = next(body for text, body in asked.items() if text.startswith("two: What"))
    assert math_body["messages"][0] == {"role": "system", "content": "Judge-multi-turn-math."}
    assert (math_body["temperature"], math_body["max_tokens"]) == (0.0, 2048)


def test_ratings_are_averaged_over_turns_and_categories(serve, tmp_path):
    ratings = {"rain": (9, 6), "2 + 3": (10, 1), "slippery": (4, 3)}

    def answer(prompt, _):
        (pair,) = (pair for text, pair in ratings.items() if text in prompt)
        return says(f"It is fine. Rating: [[{pair[prompt.startswith('two')]}]]")

    result = evaluate(tmp_path, **by_server(serve(answer)))
    assert {name: figure["value"] for name, figure in result["figures"].items()} == {
        "rating": pytest.approx(33 / 6),
        "rating_at_least": pytest.approx(33 / 6),
        "turn_1": pytest.approx(23 / 3),
        "turn_2": pytest.approx(10 / 3),
        "unparsed": 0.0,
    }
    assert result["figures"]["rating"]["count"] == 6
    categories = {name: figure["value"] for name, figure in result["groups"]["category"].items()}
    assert categories == {"writing": 7.5, "math": 5.5, "stem": 3.5}
    assert "accuracy" not in result


def test_ratings_that_cannot_be_read_are_counted_and_in_the_lower_bound(serve, tmp_path):
    def answer(prompt, _):
        if "rain" in prompt:
            return says("It is [[great]].")
        if "2 + 3" in prompt:
            return fails(400, "too long") if prompt.startswith("two") else says("[[11]]")
        return says("[[7]]")

    result = evaluate(tmp_path, **by_server(serve(answer)))
    figures = result["figures"]
    assert (figures["rating"]["value"], figures["rating"]["count"]) == (7.0, 2)
    assert (figures["rating_at_least"]["value"], figures["rating_at_least"]["count"]) == (pytest.approx(3.0), 6)
    assert (figures["unparsed"]["value"], figures["unparsed"]["count"]) == (pytest.approx(4 / 6), 6)
    assert result["groups"]["category"].keys() == {"stem"}
    details = [line["details"] for line in lines(task_directory(tmp_path) / "samples.jsonl")]
    assert details[0] == {"ratings": [None, None], "verdicts": ["It is [[great]]."] * 2}


def test_a_turn_that_could_not_be_answered_is_a_one_without_a_question(serve, tmp_path):
    server = serve(lambda prompt, _: says("[[8]]"))
    result = evaluate(tmp_path, Writer(too_long={"evaluate/mt_bench/150/0/1"}), **by_server(server))
    assert result["figures"]["turn_2"]["value"] == pytest.approx(17 / 3)
    assert (result["figures"]["unparsed"]["value"], len(server.seen)) == (0.0, 5)


def test_a_local_judge_gives_expected_ratings(tmp_path):
    def prefer(prompt, choices):
        assert (choices, prompt[0].role) == (CHOICES, "system")
        return [math.log(0.75 if n == 8 else 0.25 if n == 4 else 1e-12) - 3 for n in range(1, 11)]

    judge = LocalJudge(prefer)
    result = evaluate(tmp_path, judge_with=judge, judge="some/model")
    assert result["figures"]["rating"]["value"] == pytest.approx(7.0)
    assert len(judge.prompts) == 6


def test_another_judge_scores_the_kept_responses_again(serve, tmp_path):
    model = Writer()
    for n in (3, 5):
        server = serve(lambda prompt, _, n=n: says(f"[[{n}]]"))
        result = evaluate(tmp_path, model, judge=server.url, judge_model=f"judge {n}")
        assert result["figures"]["rating"]["value"] == n
    assert len(model.asked) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[8]]", 8.0),
        ("[[ 7.5 ]] because", 7.5),
        ("[1] is cited. Rating: [[6]]", 6.0),
        ("Rating: [9]", 9.0),
        ("[[10]]", 10.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("Rating: 8", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_rating_is_the_first_number_in_double_brackets_or_else_in_single_ones(text, expected):
    assert rating(Verdict(text)) == expected


def test_a_model_without_a_chat_template_is_refused_with_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"mt_bench: .*--model\.chat_template"):
        TASK.samples(TaskOptions(EvaluateConfig(task_data=str(write_data(tmp_path))), chat=False))


@pytest.mark.parametrize("name", [PROMPTS, REFERENCES])
def test_files_of_the_judge_are_checked_before_anything_is_computed_if_there_is_one(tmp_path, name):
    (write_data(tmp_path) / name).write_text('{"name": "single-v1"}\n')
    TASK.check(EvaluateConfig(task_data=str(tmp_path)))
    with pytest.raises(UserError, match=Path(name).name):
        TASK.check(EvaluateConfig(task_data=str(tmp_path), judge="some/model"))


def test_a_question_of_math_without_a_reference_is_named(serve, tmp_path):
    server = serve(lambda prompt, _: says("[[5]]"))
    path = write_data(tmp_path / "data") / REFERENCES
    path.write_text(path.read_text().replace("111", "112"))
    settings = EvaluateConfig(tasks=("mt_bench",), task_data=str(tmp_path / "data"), **by_server(server))
    with pytest.raises(UserError, match=r"reference_answer_gpt-4.jsonl has no answers to question 111"):
        evaluators(settings, {"chat_template": "chatml", "weights": "w"})["mt_bench"](
            Writer(), task_directory(tmp_path), Counting()
        )


def test_published_files_have_80_talks_and_a_prompt_for_every_turn_of_each(serve, tmp_path):
    data = published(QUESTIONS).parents[1]
    server = serve(lambda prompt, _: says("Rating: [[4]]"))
    settings = EvaluateConfig(tasks=("mt_bench",), task_data=str(data), **by_server(server))
    evaluator = evaluators(settings, {"chat_template": "chatml", "weights": "w"})["mt_bench"]
    result = evaluator(Writer(), task_directory(tmp_path), Counting())
    assert (result["count"], result["figures"]["rating"]["count"]) == (80, 160)
    assert len(result["groups"]["category"]) == 8
    assert len(server.seen) == 160
    with_reference = [body for *_, body in server.seen if "Reference" in body["messages"][1]["content"]]
    assert len(with_reference) == 60
