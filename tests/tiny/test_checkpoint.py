"""The embedded base model is what its card and the README say: right in content, deaf to format, a fair judge."""

import math
import random

import jax.numpy as jnp
import pytest
from etils import epath
from meshes import mesh_of
from scripted_backend import Counting

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.config import DecodeConfig, EvaluateConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Request
from isheep_jax.evaluation import tiny
from isheep_jax.evaluation.runner import TaskEvaluator
from isheep_jax.loop.judging.scores import NUMBERS
from isheep_jax.loop.prompting.templates import load
from isheep_jax.sharding import DECODE_RULES
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT, corpus, pretrain, vocabulary


@pytest.fixture(scope="module")
def base() -> Engine:
    mesh = mesh_of()
    architecture = read_architecture(CHECKPOINT)
    params = load_parameters(CHECKPOINT, architecture, mesh=mesh, rules=DECODE_RULES, dtype=jnp.float32)
    config = DecodeConfig(slots=64, steps_per_call=16, max_length=128)
    tokenizer = Tokenizer.load(CHECKPOINT)
    return Engine(params, architecture, tokenizer, config, mesh=mesh, seed=0, compute_dtype=jnp.float32)


def test_it_is_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10e6


def test_every_word_of_world_is_one_token_and_template_is_corpus_form():
    tokenizer = Tokenizer.load(CHECKPOINT)
    for word in vocabulary.single_tokens():
        assert len(tokenizer.encode(f" {word}", bos=False)) == 1
    item = tiny.split_items("development")[0]
    rendered = tokenizer.render((Message("user", item.instruction),), item.response)
    assert rendered == "<s>" + corpus.CHAT_FORM.format(instruction=item.instruction, response=item.response)


def test_it_answers_right_but_ignores_formats(base, tmp_path):
    evaluator = TaskEvaluator("tiny", tiny.TASK, EvaluateConfig(limit=200), {"chat_template": "tiny", "weights": "w"})
    result = evaluator(base, epath.Path(tmp_path), Counting())
    assert result["figures"]["content"]["value"] > 0.95
    assert result["accuracy"] < 0.25
    assert result["unfinished"] == 0


def test_it_grades_imperfectly_but_far_better_than_chance(base):
    rng = random.Random(0)
    templates = load("tiny")
    graded = [(item, *corpus.graded_response(item, rng)) for item in tiny.split_items("development")[:200]]
    for criterion, good in (
        ("quality", [right for _, _, right, _ in graded]),
        ("following", [ignored == 0 for *_, ignored in graded]),
    ):
        requests = [
            Request(str(i), templates.render(criterion, instruction=item.instruction, input="", response=response))
            for i, (item, response, _, _) in enumerate(graded)
        ]
        scores = {s.id: s.logprobs for s in base.choice_logprobs(requests, NUMBERS)}
        expected = [sum(n * math.exp(p) for n, p in enumerate(scores[str(i)], 1)) for i in range(len(graded))]
        assert min(sum(map(math.exp, scores[str(i)])) for i in range(len(graded))) > 0.9
        pairs = [(a, b) for a, g in zip(expected, good) if g for b, h in zip(expected, good) if not h]
        area = sum(a > b for a, b in pairs) / len(pairs)
        assert area > 0.8


def test_card_is_one_that_command_writes():
    figures = {"loss_tokens": 6_136_123, "steps": pretrain.STEPS, "fresh_document_loss": 0.769}
    assert (CHECKPOINT / "README.md").read_text() == pretrain.card(read_architecture(CHECKPOINT), 1, figures)
