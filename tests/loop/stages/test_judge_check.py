"""The check of the judge in a run: when it is made, what a judge that fails leads to, and what a run keeps of it."""

import dataclasses
import json

import pytest
from scripted_backend import Fuse, Killed, ScriptedBackend, ScriptedModel, SilentReporter, evaluator, tiny_config

from isheep_jax.config import AssessConfig, GuardConfig, SelectConfig
from isheep_jax.decode.requests import ChoiceLogprobs
from isheep_jax.errors import NothingLeftError, UserError
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.prompting.seeds import read_seeds
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.stages.judge_check import is_needed

OUTPUTS = {seed.output for seed in read_seeds(load("standard").seeds_file("builtin"), 1)}


class GoodJudge(ScriptedModel):
    """Knows the outputs of the seeds."""

    def choice_logprobs(self, requests, choices):
        for result, request in zip(super().choice_logprobs(requests, choices), reversed(requests), strict=True):
            prompt = request.prompt
            text = prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
            good = any(f"{output}\n" in text for output in OUTPUTS)
            peak = 9 if good else 1
            yield ChoiceLogprobs(result.id, tuple(-abs(n - peak) + x / 10 for n, x in enumerate(result.logprobs, 1)))


class GoodBackend(ScriptedBackend):
    def model(self, name):
        return GoodJudge(name, self.fuse)


def go(config, backend=None):
    backend, reporter = backend or ScriptedBackend(), SilentReporter()
    summaries = run(config, backend, {"fake": evaluator}, frozenset(), reporter)
    return backend, reporter, summaries


def config_of(workdir, judge="stop", **changes):
    return tiny_config(workdir, guard=GuardConfig(judge=judge), **changes)


def checks(reporter):
    return [stage[0] for stage in reporter.stages if stage[1] == "check the judge"]


def test_each_new_judge_is_checked_before_an_iteration_and_the_result_is_kept(tmp_path):
    backend, reporter, summaries = go(config_of(tmp_path, iterations=2), GoodBackend())
    assert next(stage[1] for stage in reporter.stages if stage[0] == 1) == "check the judge"
    assert checks(reporter) == [1, 2]
    assert summaries[0].judge_check is None
    for number in (1, 2):
        directory = tmp_path / f"iteration_{number}"
        summary = json.loads((directory / "summary.json").read_text())["judge_check"]
        assert summary["readings"]["rubric"]["auc"]["value"] > 0.9
        assert json.loads((directory / "judge_check" / "DONE").read_text())["counts"]["auc"] > 0.9
    assert sum("selection by rubric: AUC" in line for line in reporter.lines) == 2
    cards = [job.card for job in backend.calls]
    assert all("## Check of the judge" in card and "| shuffled | " in card for card in cards)


def test_a_judge_that_was_checked_is_not_checked_again(tmp_path):
    backend, reporter, summaries = go(config_of(tmp_path, assess=AssessConfig(judge="base")), GoodBackend())
    assert checks(reporter) == [1]
    assert summaries[2].judge_check is None
    # The card of the second model shows the check of its judge all the same.
    assert "## Check of the judge" in backend.calls[1].card


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, [True, True, True]),
        ({"assess": AssessConfig(judge="previous")}, [True, False, True]),
        ({"assess": AssessConfig(judge="http://localhost:1/v1")}, [True, False, False]),
        ({"assess": AssessConfig(readings=())}, [False] * 3),
        ({"assess": AssessConfig(readings=("self_consistency",))}, [False] * 3),
        # Only what cannot be checked counts.
        (
            {
                "assess": AssessConfig(readings=("lift", "self_consistency")),
                "select": SelectConfig("top_fraction", weights=(0.0, 1.0)),
            },
            [False] * 3,
        ),
        ({"select": SelectConfig(rule="random")}, [False] * 3),
        ({"select": SelectConfig(rule="none")}, [False] * 3),
        ({"select": SelectConfig(rule="random_threshold")}, [True, True, True]),
        ({"guard": GuardConfig(judge="off")}, [False] * 3),
    ],
)
def test_a_judge_is_checked_where_selection_looks_at_a_new_one(tmp_path, changes, needed):
    config = dataclasses.replace(config_of(tmp_path), **changes)
    assert [is_needed(config, number) for number in (1, 2, 3)] == needed


def test_a_coin_stops_the_run_before_it_writes_anything_and_a_better_reading_is_named(tmp_path):
    class Likelihoods(ScriptedModel):
        """A coin as a grader, whose likelihoods know the outputs of the seeds."""

        def text_logprobs(self, requests, texts):
            results = super().text_logprobs(requests, texts)
            for result, text in zip(results, reversed(list(texts)), strict=True):
                yield dataclasses.replace(result, logprob=result.tokens * (-1.0 if text in OUTPUTS else -3.0))

    class Backend(ScriptedBackend):
        def model(self, name):
            return Likelihoods(name, self.fuse)

    config = config_of(tmp_path)
    with pytest.raises(NothingLeftError) as stop:
        go(config, Backend())
    message = str(stop.value)
    assert "by rubric, the judge puts a good response above a damaged one with AUC 0." in message
    assert "--assess.readings=likelihood --select.rule=top_fraction" in message
    assert "guard.judge=warn" in message
    assert "\n" not in message
    assert not (tmp_path / "iteration_1" / "instructions").exists()

    # With the settings that it names, the same directory goes on.
    settings = {"assess": AssessConfig(readings=("likelihood",)), "select": SelectConfig(rule="top_fraction")}
    _, reporter, summaries = go(dataclasses.replace(config, **settings), Backend())
    assert checks(reporter) == [1, 2]
    assert summaries[1].judge_check["chosen"] == "likelihood per token"


def test_finished_run_whose_judge_fails_on_other_pairs_says_so_in_records_and_summary(tmp_path):
    go(config_of(tmp_path, iterations=1), GoodBackend())
    rows = [
        {"instruction": f"Say {n}.", "better": "no", "worse": output} for n, output in enumerate(sorted(OUTPUTS)[:9])
    ]
    path = tmp_path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tmp_path, guard=GuardConfig(judge="stop", pairs=str(path)), iterations=1)
    _, reporter, summaries = go(config, GoodBackend())
    assert any("the judge puts a good response above a damaged one" in line for line in reporter.lines)
    auc = summaries[1].judge_check["readings"]["rubric"]["auc"]["value"]
    assert auc < 0.5
    place = tmp_path / "iteration_1"
    assert json.loads((place / "judge_check" / "DONE").read_text())["counts"]["auc"] == auc
    assert json.loads((place / "summary.json").read_text())["judge_check"]["readings"]["rubric"]["auc"]["value"] == auc


def test_check_of_other_pairs_that_is_killed_leaves_no_summary_of_the_former(tmp_path):
    go(config_of(tmp_path, iterations=1), GoodBackend())
    path = tmp_path.with_suffix(".jsonl")
    row = {"better": "good", "worse": "bad"}
    path.write_text("".join(json.dumps({"instruction": f"Say {n}.", **row}) + "\n" for n in range(9)))
    config = tiny_config(tmp_path, guard=GuardConfig(pairs=str(path)), iterations=1)
    with pytest.raises(Killed):
        go(config, GoodBackend(Fuse(3)))
    assert not (tmp_path / "iteration_1" / "summary.json").exists()
    assert go(config, GoodBackend())[2][1].judge_check["tasks"] == 9
    assert (tmp_path / "iteration_1" / "summary.json").exists()


def test_pairs_that_cannot_be_read_stop_a_run_before_it_measures_anything(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}")
    config = dataclasses.replace(config_of(tmp_path / "run"), guard=GuardConfig(pairs=str(path)))
    with pytest.raises(UserError, match=r"^guard\.pairs: .*, line 1: "):
        go(config)
    assert not (tmp_path / "run").exists()


def test_a_coin_may_be_warned_of_once_or_not_looked_at(tmp_path):
    _, reporter, _ = go(config_of(tmp_path / "warn", "warn", iterations=1))
    assert sum("by rubric, the judge puts a good response" in line for line in reporter.lines) == 1
    _, again, _ = go(config_of(tmp_path / "warn", "warn", iterations=1))
    assert again.lines == reporter.lines[-1:]  # the best iteration
    _, reporter, summaries = go(config_of(tmp_path / "off", "off", iterations=1))
    assert checks(reporter) == []
    assert summaries[1].judge_check is None


def test_a_stopped_run_that_is_started_again_stops_again_without_reading_the_pairs_again(tmp_path):
    for expected in ([1], []):
        reporter = SilentReporter()
        with pytest.raises(NothingLeftError, match="by rubric"):
            run(config_of(tmp_path), ScriptedBackend(), {"fake": evaluator}, frozenset(), reporter)
        assert checks(reporter) == expected
    go(config_of(tmp_path, "warn", iterations=2))


def test_pairs_of_a_file_replace_the_seeds_and_another_file_is_checked_anew(tmp_path):
    def file(word):
        path = tmp_path / f"{word}.jsonl"
        rows = [
            {"instruction": f"Say {n}.", "better": output, "worse": word}
            for n, output in enumerate(sorted(OUTPUTS)[:9])
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return GuardConfig(pairs=str(path))

    for word in ("no", "nothing"):
        config = tiny_config(tmp_path / "run", guard=file(word), iterations=1)
        _, _, summaries = go(config, GoodBackend())
        summary = summaries[1].judge_check
        assert summary["tasks"] == 9
        assert list(summary["readings"]["rubric"]["kinds"]) == ["worse"]
        records = (tmp_path / "run/iteration_1/judge_check/part-00000.jsonl").read_text().splitlines()
        assert json.loads(records[1])["response"] == word
