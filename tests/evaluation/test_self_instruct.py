"""The loss on people's answers is that of fine-tuning, by token, and the model writes nothing."""

import json

import pytest
from etils import epath
from published import published
from scripted_backend import Counting

from isheep_jax.config import Config, EvaluateConfig, StopConfig
from isheep_jax.decode.requests import TextLogprob
from isheep_jax.errors import UserError
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.evaluation.self_instruct import DATA, TASK
from isheep_jax.evaluation.task import TaskOptions
from isheep_jax.evaluation.tasks import check_stop, held_out_texts
from isheep_jax.text.conversation import Message

ROWS = [("Add the numbers.", "1, 2", " 3\n", True), ("Name a bird.", "", "A robin is a bird.", False)]
DECODING = {"chat_template": "some", "weights": "w"}


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "data" / DATA
    path.parent.mkdir(parents=True)
    rows = [
        {"id": f"s{n}", "instruction": i, "instances": [{"input": x, "output": y}], "is_classification": c}
        for n, (i, x, y, c) in enumerate(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateConfig(tasks=("self_instruct",), task_data=str(tmp_path / "data"))


class Reader:
    """Gives each word of a text the probability exp(-its number); refuses what `broken` names."""

    def __init__(self, broken=()):
        self.broken, self.read = broken, {}

    def text_logprobs(self, requests, texts):
        for request, text in reversed(list(zip(requests, texts, strict=True))):
            self.read[request.prompt] = text
            if request.id in self.broken:
                yield TextLogprob(request.id, error="the prompt is too long")
            else:
                logprobs = tuple(-float(n) for n, _ in enumerate(text.split(), 1))
                yield TextLogprob(request.id, sum(logprobs), len(logprobs), logprobs=logprobs)


def evaluate(settings, directory, model=None, decoding=DECODING):
    return TaskEvaluator("self_instruct", TASK, settings, decoding)(model or Reader(), directory, Counting())


def test_loss_is_the_mean_over_tokens_with_an_error_clustered_by_sample(settings, tmp_path):
    result = evaluate(settings, epath.Path(tmp_path / "out"))
    # One token of loss 1, and five of losses 1 to 5.
    assert result["loss"] == pytest.approx(16 / 6)
    assert result["figures"]["loss"]["count"] == 6
    # Deviations of the two samples from six times the mean: 1 - 16/6, and 15 - 5 * 16/6.
    assert result["stderr"] == pytest.approx((2 * 2 * (16 / 6 - 1) ** 2) ** 0.5 / 6)
    assert result["groups"]["kind"]["classification"]["value"] == 1.0
    assert "accuracy" not in result


def test_a_chat_model_reads_the_answer_after_the_users_turn(settings, tmp_path):
    model = Reader()
    evaluate(settings, epath.Path(tmp_path / "out"), model)
    assert model.read == {
        (Message("user", "Add the numbers.\n1, 2"),): "3",
        (Message("user", "Name a bird."),): "A robin is a bird.",
    }


def test_a_base_model_reads_the_answer_where_the_text_ends(settings, tmp_path):
    model = Reader()
    evaluate(settings, epath.Path(tmp_path / "out"), model, {**DECODING, "chat_template": ""})
    assert model.read["Instruction:\nAdd the numbers.\n1, 2\n\nResponse:\n"] == "3"


def test_samples_keep_the_loss_of_each_token(settings, tmp_path):
    evaluate(settings, epath.Path(tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["values"]["loss"] for line in lines] == [[1.0], [1.0, 2.0, 3.0, 4.0, 5.0]]
    assert lines[0]["texts"] == ["3"]


def test_an_answer_that_does_not_fit_is_left_out_and_counted(settings, tmp_path):
    result = evaluate(settings, epath.Path(tmp_path / "out"), Reader(broken=["evaluate/self_instruct/s1/0"]))
    assert (result["loss"], result["unanswered"], result["count"]) == (1.0, 1, 2)


def test_no_run_stops_or_chooses_by_it(settings):
    with pytest.raises(UserError, match=r"--stop.measure: accuracy is not measured by self_instruct"):
        check_stop(Config(stop=StopConfig("accuracy"), evaluate=settings))


def test_instructions_are_held_out_alone_and_with_their_input(settings):
    assert held_out_texts(settings) == {"Add the numbers.", "Add the numbers.\n1, 2", "Name a bird."}


@pytest.mark.parametrize("line", ["[]", '{"id": "x"}', "{", '{"id": "x", "instruction": "y", "instances": []}'])
def test_other_files_are_refused(settings, line):
    (epath.Path(settings.task_data) / DATA).write_text(line + "\n")
    with pytest.raises(UserError, match=r"seed_tasks\.jsonl.* (is not Self-Instruct|should be like)"):
        TASK.samples(TaskOptions(settings))


def test_published_tasks_are_all_read():
    settings = EvaluateConfig(task_data=str(published(DATA).parents[1]))
    samples = TASK.samples(TaskOptions(settings))
    assert len(samples) == len({s.id for s in samples}) == 175
    assert all(sample.given and sample.given == sample.given.strip() for sample in samples)
