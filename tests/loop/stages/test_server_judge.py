"""A run whose judge is a server: what it said is kept, and a judge of no use is not paid to the end."""

from collections import Counter

import pytest
from chat_stand_in import fails, says
from scripted_backend import ScriptedBackend, SilentReporter, evaluator, tiny_config

from isheep_jax.config import AssessConfig, GuardConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.context import SERVER_PART

JUDGE_REQUESTS = 2


def config_of(workdir, server, **changes):
    assess = AssessConfig(
        judge=server.url, judge_model="m", judge_key="NO_KEY", read="sampled", judge_requests=JUDGE_REQUESTS
    )
    return tiny_config(workdir, iterations=1, assess=assess, **changes)


def go(config):
    reporter = SilentReporter()
    run(config, ScriptedBackend(), {"fake": evaluator}, frozenset(), reporter)
    return reporter


def score_of(prompt):
    return says(f"{len(prompt) % 9 + 1}||so")


def files_of(directory):
    """The records of the judge and the model that was made of them."""
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.name.startswith("part-") or "model" in path.parent.name
    }


@pytest.mark.parametrize("failure", [1, 40, 75])
def test_a_run_whose_server_fails_goes_on_and_asks_little_again(serve, tmp_path, failure):
    whole = serve(lambda prompt, _: score_of(prompt))
    go(config_of(tmp_path / "whole", whole))
    asked = Counter(whole.attempts)

    server = serve(lambda prompt, _: score_of(prompt))
    server.refuses = lambda body: fails(402, "pay first") if len(server.seen) > failure else None
    with pytest.raises(UserError, match=r"--assess\.judge: .* answers 402 .*pay first"):
        go(config_of(tmp_path / "run", server))
    before = Counter(server.attempts)
    server.refuses = lambda body: None
    go(config_of(tmp_path / "run", server))
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    # The two criteria of a part's pairs, and what was on its way.
    again = sum(server.attempts[prompt] - asked[prompt] for prompt in before)
    assert again <= 2 * SERVER_PART + 4 * JUDGE_REQUESTS


def test_some_bad_answers_are_pairs_without_a_score_and_are_counted(serve, tmp_path):
    bad = {3: fails(403, "flagged"), 9: says(None), 15: says("I cannot say."), 21: (200, b"<html>", {})}
    order = iter(range(10**6))
    kinds = {}

    def answer(prompt, _):
        return kinds.setdefault(prompt, bad.get(next(order))) or says("9||good")

    reporter = go(config_of(tmp_path, serve(answer)))
    assert any("4 of" in line and "no score" in line for line in reporter.lines)
    assert (tmp_path / "iteration_1" / "model").exists()


def test_a_server_that_gives_no_score_is_given_up_at_the_check_and_the_same_run_goes_on_when_it_does(serve, tmp_path):
    server = serve(lambda prompt, _: says("It is good, I think."))
    config = config_of(tmp_path, server, guard=GuardConfig(judge="warn"))
    with pytest.raises(UserError, match="first 20 pairs begins with a score, such as 'It is"):
        go(config)
    assert len(server.seen) < 60
    server.answer = lambda prompt, _: score_of(prompt)
    go(config)
    assert (tmp_path / "iteration_1" / "model").exists()
