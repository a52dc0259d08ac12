import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from minute_model import ARCHITECTURE, TableTokenizer, full_logits, make_engine, ragged

from isheep_jax.decode import prefill_logprobs
from isheep_jax.decode.packing import empty_rows
from isheep_jax.decode.prefill_logprobs import packed_logprobs
from isheep_jax.decode.requests import NOT_NUMBERS, Request, SamplingParams, TokenIds
from isheep_jax.decode.text_logprobs import token_logprobs
from isheep_jax.model.transformer import ForwardSetup, forward

PREFIX = "the quick brown fox jumps over 13 lazy dogs. "
CHOICES = {
    "single": ["a", "0", "."],
    "several": ["a", "1||", "10||", "10..", "hijklmn"],  # of one to seven tokens, some with a common beginning
    "empty": ["", "."],
    "digits split": ["1", "12", "123", "1234", "2", "12"],  # each but the last two begins others
}


def expected_logprob(params, request: Request, choice: str) -> float:
    """The sum over the choice's tokens of the plain forward's log-softmax, in float64."""
    prompt = TableTokenizer().encode(request.prompt)
    continuation = TableTokenizer().encode_choices(request.prompt, [choice])[0]
    logits = full_logits(params, [*prompt, *continuation]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(continuation))


def expected_end(params, request: Request, text: str) -> float:
    """The plain forward's log-softmax of the first eos token after the prompt and the text, in float64."""
    tokens = TableTokenizer().encode(request.prompt) + TableTokenizer().encode_choices(request.prompt, [text])[0]
    logits = full_logits(params, tokens)[-1].astype(np.float64)
    return (logits - np.log(np.exp(logits).sum()))[TableTokenizer().eos_ids[0]]


def expected_probability(params, request: Request, choice: str, choices: list[str]) -> float:
    """The probability of a choice without that of longer choices that begin with its tokens."""
    tokens = dict(zip(choices, TableTokenizer().encode_choices(request.prompt, choices)))
    longer = {c for c in choices if c != choice and tokens[c][: len(tokens[choice])] == tokens[choice]}
    longer -= {c for c in longer for d in longer - {c} if tokens[c][: len(tokens[d])] == tokens[d]}
    one, *others = (np.exp(expected_logprob(params, request, c)) for c in (choice, *longer))
    return one - sum(others)


@pytest.mark.parametrize("kind", CHOICES)
def test_choice_logprobs_are_log_softmax_of_full_forward(params, kind):
    # A digit at the end of the prompts keeps every choice from merging with them.
    requests = [Request(request.id, request.prompt + "7") for request in ragged(9)]
    results = {result.id: result for result in make_engine(params).choice_logprobs(requests, CHOICES[kind])}
    for request in requests:
        assert not results[request.id].error
        expected = [expected_probability(params, request, choice, CHOICES[kind]) for choice in CHOICES[kind]]
        np.testing.assert_allclose(np.exp(results[request.id].logprobs), expected, atol=1e-5)


def test_choice_logprobs_do_not_depend_on_batch_or_neighbors(params):
    requests = [Request(request.id, request.prompt + "7") for request in ragged(9)]
    choices = CHOICES["several"]
    expected = {result.id: result for result in make_engine(params).choice_logprobs(requests, choices)}
    assert {result.id: result for result in make_engine(params).choice_logprobs(requests[::-1], choices)} == expected
    for result in make_engine(params).choice_logprobs(requests[2:5], choices):
        np.testing.assert_allclose(result.logprobs, expected[result.id].logprobs, atol=1e-5)


def test_windows_of_tokenizing_change_no_result(params, monkeypatch):
    requests = [Request(f"{i}", f"abcdefgh{i}7") for i in range(7)]
    requests.insert(3, Request("long", "7" * 99))
    engine = make_engine(params)

    def results():
        found = {result.id: result for result in engine.choice_logprobs(requests, CHOICES["single"])}
        assert found.keys() == {request.id for request in requests}
        assert found.pop("long").error
        return [found[id].logprobs for id in sorted(found)]

    expected = results()
    monkeypatch.setattr(prefill_logprobs, "_WINDOW", 3)
    np.testing.assert_allclose(results(), expected, atol=1e-5)


def test_first_prompts_are_scored_before_the_last_are_tokenized(params, monkeypatch):
    class Counting(TableTokenizer):
        prompts = 0

        def encode_prompts(self, prompts):
            self.prompts += len(prompts)
            return super().encode_prompts(prompts)

    monkeypatch.setattr(prefill_logprobs, "_WINDOW", 2)
    tokenizer = Counting()
    results = make_engine(params, tokenizer=tokenizer).choice_logprobs([Request(f"{i}", "7") for i in range(20)], ["b"])
    next(results)
    assert tokenizer.prompts < 20
    assert len(list(results)) == 19
    assert tokenizer.prompts == 20


def test_prompt_that_does_not_fit_or_does_not_split_is_error_of_that_request_alone(params):
    requests = [Request("long", "7" * 46), Request("merges", "a"), Request("fine", "7")]
    results = {result.id: result for result in make_engine(params).choice_logprobs(requests, ["b", "10||"])}
    assert "47 tokens" in results["long"].error
    assert "decode.max_length=48" in results["long"].error
    assert "change" in results["merges"].error
    assert not results["long"].logprobs
    assert not results["merges"].logprobs
    assert len(results["fine"].logprobs) == 2


def test_more_choices_than_segment_ids_keep_apart_are_refused(params):
    engine = make_engine(params)
    with pytest.raises(ValueError, match="1025 choices to score: from 1 to 1024"):
        engine.choice_logprobs([Request("a", "7")], ["b"] * 1025)
    with pytest.raises(ValueError, match="0 choices"):
        engine.choice_logprobs([Request("a", "7")], [])


def test_no_program_holds_logits_of_all_positions(params):
    engine = make_engine(params)
    packed, at = empty_rows(1, 512), np.zeros((1, 256), np.int32)
    static = engine.model.static_args
    choices = packed_logprobs.lower(engine.model.params, packed, at, at[..., None], None, collect_kv=False, **static)
    texts = token_logprobs.lower(engine.model.params, packed, at, at, None, **static)
    for program in (choices.as_text(), texts.as_text()):
        assert "tensor<1x128x64xf32>" in program
        for positions in (256, 512):
            assert f"tensor<1x{positions}x64xf32>" not in program


def test_numbers_count_once_where_digits_are_split_and_add_up_to_what_follows(params):
    request, numbers = Request("a", "the score 7"), ["1", "13", "2"]
    (result,) = make_engine(params).choice_logprobs([request], numbers)
    (alone,) = make_engine(params).choice_logprobs([request], ["1"])
    one, thirteen, _ = np.exp(result.logprobs)
    assert one + thirteen == pytest.approx(np.exp(alone.logprobs[0]), abs=1e-6)
    assert 0 < thirteen < np.exp(alone.logprobs[0])


def test_tokens_of_a_text_have_their_logprobs_and_characters(params):
    texts = ["a", "10..", "hijklmn op"]
    requests = [Request(f"{i}", "7") for i in range(len(texts))]
    results = {result.id: result for result in make_engine(params).text_logprobs(requests, texts)}
    for request, text in zip(requests, texts):
        result = results[request.id]
        assert len(result.logprobs) == len(result.spans) == result.tokens
        assert sum(result.logprobs) == pytest.approx(result.logprob, abs=1e-9)
        assert "".join(text[begin:end] for begin, end in result.spans) == text
        begun = [expected_logprob(params, request, text[:end]) for _, end in result.spans]
        np.testing.assert_allclose(np.cumsum(result.logprobs), begun, atol=1e-4)
        assert result.end == pytest.approx(expected_end(params, request, text), abs=1e-4)


def test_shared_prefix_changes_no_logprob(params):
    requests = [Request(request.id, PREFIX + request.prompt + "7") for request in ragged(9)]
    sharing = [Request(request.id, request.prompt, PREFIX) for request in requests]
    engine = make_engine(params, max_length=128)
    shared = {len(engine.model.tokenize(request).prefix) for request in sharing}
    assert shared == {len(TableTokenizer().encode(PREFIX)) - 1}
    for kind in CHOICES:
        expected = {result.id: result.logprobs for result in engine.choice_logprobs(requests, CHOICES[kind])}
        for result in engine.choice_logprobs(sharing, CHOICES[kind]):
            np.testing.assert_allclose(result.logprobs, expected[result.id], atol=1e-4)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_text_logprobs_are_those_of_full_forward(params, prefix):
    requests = [Request(request.id, prefix + request.prompt + "7", prefix) for request in ragged(9)]
    texts = ["a", "1||", "10..", "hijklmn", "op op op op op op op op op op.", "0", "z", "yz", "x"]
    engine = make_engine(params, max_length=128)
    results = {result.id: result for result in engine.text_logprobs(requests, texts)}
    for request, text in zip(requests, texts):
        assert results[request.id].tokens == len(TableTokenizer().encode_choices(request.prompt, [text])[0])
        assert results[request.id].logprob == pytest.approx(expected_logprob(params, request, text), abs=1e-4)


@pytest.mark.parametrize("shared", ["", PREFIX])
def test_token_ids_are_scored_as_text_that_they_encode(params, shared):
    tokenizer, engine = TableTokenizer(), make_engine(params, max_length=128)
    requests = [Request(request.id, shared + request.prompt + "7", shared) for request in ragged(6)]
    texts = ["a", "1||", "10..", "hijklmn", "op op", "0"]
    prefix = TokenIds(tuple(tokenizer.encode(shared)[:-1])) if shared else ""
    as_tokens = [Request(r.id, TokenIds(tuple(tokenizer.encode(r.prompt))), prefix) for r in requests]
    following = [TokenIds(tuple(tokenizer.encode_choices(r.prompt, [t])[0])) for r, t in zip(requests, texts)]
    assert len({engine.model.tokenize(r).prefix for r in as_tokens}) == 1
    expected = list(engine.text_logprobs(requests, texts))
    found = list(engine.text_logprobs(as_tokens, following))
    assert found == [dataclasses.replace(result, spans=(), end=None) for result in expected]
    sampling = SamplingParams(max_tokens=4)
    assert {c.id: c for c in engine.generate(as_tokens, sampling)} == {
        c.id: c for c in engine.generate(requests, sampling)
    }


def test_text_is_greedy_where_completion_at_temperature_zero_begins_with_it(params):
    engine, requests = make_engine(params), ragged(6)
    for completion in engine.generate(requests, SamplingParams(temperature=0.0, max_tokens=6)):
        (request,) = (r for r in requests if r.id == completion.id)
        prompt, tokens = TokenIds(tuple(TableTokenizer().encode(request.prompt))), completion.tokens
        for end in range(1, len(tokens) + 1):
            (result,) = engine.text_logprobs([Request("a", prompt)], [TokenIds(tokens[:end])])
            assert result.greedy
            other = (*tokens[: end - 1], (tokens[end - 1] + 1) % ARCHITECTURE.vocab_size)
            (result,) = engine.text_logprobs([Request("a", prompt)], [TokenIds(other)])
            assert not result.greedy


def test_unknown_tokens_and_text_after_tokens_are_errors_of_that_request_alone(params):
    requests = [
        Request("unknown", TokenIds((0, 64))),
        Request("mixed", TokenIds((0, 2))),
        Request("fine", TokenIds((0, 2))),
    ]
    texts = [TokenIds((3,)), "a", TokenIds((3,))]
    results = {result.id: result for result in make_engine(params).text_logprobs(requests, texts)}
    assert results["unknown"].error == "there is no token 64: the tokenizer has 64"
    assert "must be token ids" in results["mixed"].error
    assert not results["fine"].error
    results = {result.id: result for result in make_engine(params).choice_logprobs(requests[1:], ["a"])}
    assert "cannot follow token ids" in results["fine"].error


def test_text_that_does_not_fit_is_error_of_that_request_alone(params):
    requests = [Request("a", "7"), Request("b", "7")]
    results = {result.id: result for result in make_engine(params).text_logprobs(requests, ["0" * 60, "0"])}
    assert "decode.max_length=48" in results["a"].error
    assert not results["b"].error


def test_embedding_that_is_not_numbers_is_an_error(params):
    huge = params | {"final_norm": np.full_like(params["final_norm"], 3e38)}
    (embedding,) = make_engine(huge).embed(ragged(1))
    assert (embedding.vector, embedding.error) == ((), NOT_NUMBERS)


def test_embedding_is_mean_of_prompts_hidden_states(params):
    requests = ragged(6)
    results = {embedding.id: embedding for embedding in make_engine(params).embed(requests)}
    for request in requests:
        tokens = np.asarray(TableTokenizer().encode(request.prompt))[None]
        hidden, _ = forward(params, ARCHITECTURE, tokens, np.arange(tokens.shape[1])[None], ForwardSetup(jnp.float32))
        np.testing.assert_allclose(results[request.id].vector, hidden[0].mean(axis=0), atol=1e-4)
