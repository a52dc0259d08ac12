"""The harness's own PyTorch backend and ours give the same answers; needs torch and the extra `eval`."""

import contextlib
import random

import pytest

from isheep_jax.config import DecodeConfig
from isheep_jax.runtime.load import load

torch = pytest.importorskip("torch", reason="compares with the harness's PyTorch backend; pip install torch accelerate")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval", reason='runs tasks of lm-evaluation-harness; pip install -e ".[eval]"')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from isheep_jax.evaluation.harness.language_model import HarnessModel  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.lm_eval]

MAX_LENGTH = 96
TURNS = [{"role": "user", "content": "What floats?"}]


class Bar:
    def advance(self, n=1, **notes):
        pass


@pytest.fixture(scope="module")
def theirs(small_checkpoint):
    # They count the tokens that are seen, and the engine those that are predicted, too.
    return HFLM(
        pretrained=str(small_checkpoint), dtype="float32", device="cpu", max_length=MAX_LENGTH - 1, batch_size=4
    )


@pytest.fixture
def ours(small_checkpoint, tmp_path):
    engine = load(str(small_checkpoint), decode=DecodeConfig(slots=8, max_length=MAX_LENGTH), compute_dtype="float32")
    progress = lambda *_: contextlib.nullcontext(Bar())  # noqa: E731
    return HarnessModel(engine, tmp_path, task="x", facts={}, max_tokens=0, progress=progress)


def words(draw: random.Random, count: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(count))


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i, metadata=("x", i, 1)) for i, a in enumerate(arguments)]


def test_log_likelihoods_are_theirs(ours, theirs):
    draw = random.Random(1)
    arguments = [(words(draw, draw.choice([1, 5, 12, 30])), f" {words(draw, draw.randint(1, 3))}") for _ in range(40)]
    arguments += [("", words(draw, 3)), ("ends in spaces  ", "a"), (theirs.apply_chat_template(TURNS), "A boat")]
    # One that they would write themselves.
    completion = instances("generate_until", ("floats", {"max_gen_toks": 5, "until": [], "do_sample": False}))
    arguments.append(("floats", theirs.generate_until(completion, disable_tqdm=True)[0]))
    expected = theirs.loglikelihood(instances("loglikelihood", *arguments), disable_tqdm=True)
    assert expected[-1][1]
    results = ours.loglikelihood(instances("loglikelihood", *arguments))
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in results] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)


def test_rolling_log_likelihoods_are_theirs(ours, theirs):
    draw = random.Random(2)
    arguments = [(words(draw, count),) for count in (1, 20, 60)]
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *arguments), disable_tqdm=True)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", *arguments)) == pytest.approx(
        expected, abs=1e-3
    )


def test_greedy_texts_are_theirs(ours, theirs):
    draw = random.Random(3)
    prompts = [words(draw, draw.choice([1, 4, 30])) for _ in range(8)] + [theirs.apply_chat_template(TURNS)]
    for arguments in ({"max_gen_toks": 24, "until": []}, {"max_gen_toks": 24, "until": ["e", "q"]}):
        requests = [(prompt, {**arguments, "do_sample": False}) for prompt in prompts]
        # One at a time: padding a batch of theirs changes nothing but the last digits.
        expected = theirs.generate_until(instances("generate_until", *requests), disable_tqdm=True)
        assert ours.generate_until(instances("generate_until", *requests)) == expected


def test_rendered_conversations_and_their_tokens_are_theirs(ours, theirs):
    text = ours.apply_chat_template(TURNS)
    assert text == theirs.apply_chat_template(TURNS)
    for string in (text, "plain text", "<s>begun"):
        assert ours.tok_encode(string) == theirs.tok_encode(string)
    assert ours.prefix_token_id == theirs.prefix_token_id
    turns = [*TURNS, {"role": "assistant", "content": "A"}]
    assert ours.apply_chat_template(turns, False) == theirs.apply_chat_template(turns, False)
