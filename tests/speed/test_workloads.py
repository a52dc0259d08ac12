import numpy as np
import pytest
from meshes import mesh_of
from minute_model import ARCHITECTURE, random_parameters

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.model.architecture import parameter_count
from isheep_jax.speed.shapes import SHAPES
from isheep_jax.speed.workloads import WORKLOADS, IdTokenizer, Workload, assess, respond, synthesize

VOCABULARY = ARCHITECTURE.vocab_size


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = DecodeConfig(slots=2, steps_per_call=4, max_length=64)
    return Engine(
        random_parameters(0),
        ARCHITECTURE,
        IdTokenizer(VOCABULARY),
        config,
        mesh=mesh_of(),
        seed=0,
        compute_dtype="float32",
    )


@pytest.mark.parametrize("build", WORKLOADS.values(), ids=WORKLOADS)
def test_workload_is_decided_by_count_and_seed(build):
    assert build(20, 1).requests(32_000) == build(20, 1).requests(32_000)
    assert build(20, 1).requests(32_000) != build(20, 2).requests(32_000)


def test_lengths_are_those_of_stages():
    few_shot, answers, pairs = synthesize(2000), respond(2000), assess(2000)
    assert set(few_shot.prompt_lengths) == {400}
    assert (min(few_shot.new_tokens), max(few_shot.new_tokens)) == (64, 512)
    assert (min(answers.prompt_lengths), max(answers.prompt_lengths)) == (20, 200)
    assert 1 <= min(answers.new_tokens) < 12
    assert max(answers.new_tokens) == 400
    assert abs(np.median(answers.new_tokens) - 55) < 4
    assert (min(pairs.prompt_lengths), max(pairs.prompt_lengths), pairs.longest) == (60, 300, 601)


def test_llama_100m_has_about_hundred_million_parameters():
    assert parameter_count(SHAPES["llama_100m"]) == 100_092_672


def test_every_completion_has_length_that_was_asked_for(engine):
    workload = Workload("few", "generate", (3, 30, 7), (9, 1, 20), prefix_length=4)
    requests = workload.requests(VOCABULARY)
    lengths = {c.id: len(c.tokens) for c in engine.generate(requests, SamplingParams())}
    assert [lengths[request.id] for request in requests] == [9, 1, 20]


def test_each_choice_is_one_token_and_prefix_is_shared(engine):
    workload = Workload("pairs", "score", (5, 9), prefix_length=40, choices=10)
    requests = workload.requests(VOCABULARY)
    prefix, prompts = workload.prompts(VOCABULARY)
    assert {engine.model.tokenize(request).prefix for request in requests} == {tuple(prefix[:-1])}
    assert engine.model.tokenizer.encode_prompt(requests[1].prompt) == prefix + prompts[1]
    scores = list(engine.choice_logprobs(requests, workload.choice_texts()))
    assert [len(score.logprobs) for score in scores] == [10, 10]
    assert all(np.exp(score.logprobs).sum() < 1 for score in scores)
