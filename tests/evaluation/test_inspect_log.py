"""Logs of inspect_ai hold every sample of an evaluation; the tests that read them need the extra 'inspect'."""

import sys

import pytest
from evaluation_files import write_evaluation

from isheep_jax.errors import UserError
from isheep_jax.evaluation.inspect_log import write_inspect_logs
from isheep_jax.evaluation.saved import Evaluation, find_evaluation

SCORES = {
    "1": [{"instruction_strict": [1, 0], "prompt_strict": 0}, {"instruction_strict": [1, 1], "prompt_strict": 1}],
    "2": [{"prompt_strict": 1}],
}


def evaluation(path) -> Evaluation:
    for task in ("ifeval", "lm_eval:other_task"):
        write_evaluation(
            path,
            SCORES,
            task,
            responses={"2": "Two."},
            title="IFEval",
            version=3,
            count=2,
            of=541,
            figures={
                name: {"value": 0.5, "stderr": 0.1, "count": 3} for name in ("instruction_strict", "prompt_strict")
            },
            settings={"attempts": 2, "sampling": [{"temperature": 0, "top_k": 0, "max_tokens": 64, "stop": ["\n"]}]},
        )
    return find_evaluation(path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(UserError, match=r"isheep_jax\[inspect\]"):
        write_inspect_logs(evaluation(tmp_path), ["ifeval"], tmp_path / "logs")


def test_a_log_read_back_holds_what_was_measured(tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    paths = write_inspect_logs(evaluation(tmp_path / "model"), ["ifeval"], tmp_path / "logs")
    log = inspect_ai.log.read_eval_log(str(paths[0]))
    assert (log.status, log.eval.task, log.eval.task_version) == ("success", "ifeval", "3")
    assert log.eval.model == str(tmp_path / "model")
    assert (log.eval.dataset.name, log.eval.dataset.samples, log.eval.config.limit) == ("IFEval", 541, 2)
    generate = log.eval.model_generate_config
    assert (generate.temperature, generate.top_k, generate.max_tokens, generate.stop_seqs) == (0, None, 64, ["\n"])
    assert [score.name for score in log.results.scores] == ["prompt_strict", "instruction_strict"]
    assert {name: metric.value for name, metric in log.results.scores[0].metrics.items()} == {
        "mean": 0.5,
        "stderr": 0.1,
    }


def test_every_response_is_a_sample_with_messages_and_scores(tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    paths = write_inspect_logs(evaluation(tmp_path / "model"), ["ifeval"], tmp_path / "logs")
    samples = sorted(inspect_ai.log.read_eval_log(str(paths[0])).samples, key=lambda sample: (sample.id, sample.epoch))
    assert [(sample.id, sample.epoch) for sample in samples] == [("1", 1), ("1", 2), ("2", 1)]
    assert [[(m.role, m.text) for m in sample.messages] for sample in samples][2] == [
        ("user", "Question 2?"), ("assistant", "Two."),
    ]  # fmt: skip
    assert (samples[2].output.completion, samples[2].output.stop_reason) == ("Two.", "stop")
    # The main score comes first, because the viewer's list shows that one.
    assert [{name: score.value for name, score in sample.scores.items()} for sample in samples[:2]] == [
        {"prompt_strict": 0, "instruction_strict": [1, 0]}, {"prompt_strict": 1, "instruction_strict": [1, 1]},
    ]  # fmt: skip
    assert list(samples[0].scores) == ["prompt_strict", "instruction_strict"]


def test_logs_are_listed_by_task_and_written_again_in_place(tmp_path):
    inspect_ai = pytest.importorskip("inspect_ai")
    model = evaluation(tmp_path / "model")
    first, again = (write_inspect_logs(model, model.results, tmp_path / "logs") for _ in range(2))
    assert first == again
    listed = inspect_ai.log.list_eval_logs(str(tmp_path / "logs"))
    assert sorted(log.task for log in listed) == ["ifeval", "lm-eval-other-task"]
    headers = [inspect_ai.log.read_eval_log(log, header_only=True) for log in listed]
    assert sorted(header.eval.task for header in headers) == ["ifeval", "lm_eval:other_task"]
