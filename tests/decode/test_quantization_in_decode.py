"""Decoding with int8 weights and an int8 KV cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from minute_model import ARCHITECTURE, TableTokenizer, make_engine, ragged

from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import replicated
from isheep_jax.decode.device_slots import new_slots, take_slots
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.model import quantization
from isheep_jax.model.quantization import abstract_weights, dequantize_weights, weight_table
from isheep_jax.sharding import DECODE_RULES, param_shardings, put
from isheep_jax.speed.quantization_error import measure_quantization_error
from isheep_jax.tiny import CHECKPOINT

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12)
INT8 = {"weights_dtype": "int8", "kv_cache_dtype": "int8"}


def by_id(completions) -> dict:
    return {completion.id: completion for completion in completions}


def test_int8_weights_decode_and_score_as_their_dequantized_floats(params):
    engine = make_engine(params, weights_dtype="int8")
    plain = make_engine(dequantize_weights(engine.model.params, ARCHITECTURE))
    requests = ragged(14)
    completions = by_id(engine.generate(requests, GREEDY))
    assert completions == by_id(plain.generate(requests, GREEDY))
    assert completions != by_id(make_engine(params).generate(requests, GREEDY))
    choices = ["1", "10", "ab"]
    expected = by_id(plain.choice_logprobs(requests[:9], choices))
    for result in engine.choice_logprobs(requests[:9], choices):
        np.testing.assert_allclose(result.logprobs, expected[result.id].logprobs, atol=1e-3)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_tokens_do_not_depend_on_slots_steps_per_call_order_or_neighbors(params, sampling):
    # Two of each prompt, so that slots are copied.
    requests = [Request(f"{r.id}/{i}", r.prompt) for r in ragged(8) for i in range(2)]
    engine = make_engine(params, **INT8)
    expected = by_id(engine.generate(requests, sampling))
    assert by_id(make_engine(params, slots=16, steps_per_call=64, **INT8).generate(requests, sampling)) == expected
    assert by_id(engine.generate(requests[::-1], sampling)) == expected
    for request in requests[::5]:
        assert list(engine.generate([request], sampling)) == [expected[request.id]]


def test_mesh_gives_tokens_of_one_device_and_splits_scales_as_their_outputs(params):
    requests, mesh = ragged(12), mesh_of((4, 1, 2))
    expected = by_id(make_engine(params, **INT8).generate(requests, GREEDY))
    engine = make_engine(params, slots=8, mesh=mesh, **INT8)
    assert by_id(engine.generate(requests, GREEDY)) == expected
    weights = engine.model.params
    shardings = param_shardings(weight_table(ARCHITECTURE, "int8"), mesh, DECODE_RULES)
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), weights, shardings)
    assert all(jax.tree.leaves(same))
    assert weights["layers"]["wq"].scale.sharding.shard_shape((2, 4, 8)) == (2, 2, 8)
    # Weights that are quantized already stay as they are.
    again = make_engine(weights, slots=8, mesh=mesh, **INT8).model.params
    jax.tree.map(np.testing.assert_array_equal, again, weights)


def test_shared_prefix_stays_in_floats_with_int8_cache(params):
    prefix = "the quick brown fox jumps over 13 lazy dogs. "
    requests = [Request(request.id, prefix + request.prompt, prefix) for request in ragged(6)]
    plain = by_id(make_engine(params, max_length=128).generate(requests, GREEDY))
    completions = by_id(make_engine(params, max_length=128, kv_cache_dtype="int8").generate(requests, GREEDY))
    # The first token is sampled from prompt tokens alone; most of them, the prefix's, are exact.
    assert sum(completions[r.id].tokens[:1] == plain[r.id].tokens[:1] for r in requests) >= 5


def test_slots_move_with_their_scales():
    mesh = mesh_of()
    slots = new_slots(ARCHITECTURE, 4, 128, jnp.dtype(jnp.int8), mesh, penalties=False)
    slots = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), slots)
    rows = np.asarray([2, 0], np.int32)
    moved = jax.tree.leaves(take_slots(slots, put(rows, replicated(mesh)), mesh=mesh).cache)
    numbers, scales = [(2, 2, 1, 2, 8, 128), (2, 2, 1, 2, 128, 8)], [(2, 2, 128, 2)] * 2
    assert [x.shape for x in moved] == numbers + scales
    for before, after in zip(jax.tree.leaves(slots.cache), moved):
        np.testing.assert_array_equal(after, before[:, rows])


def test_unknown_settings_are_one_clear_line(params):
    with pytest.raises(UserError, match=r"decode\.weights_dtype=int4 .* model or int8$"):
        make_engine(params, weights_dtype="int4")
    with pytest.raises(UserError, match=r"decode\.kv_cache_dtype=fp8 .* model or int8$"):
        make_engine(params, kv_cache_dtype="fp8")


@pytest.fixture(scope="module")
def tiny():
    model = open_model(CHECKPOINT)
    return model, model.load(mesh=mesh_of(), rules=DECODE_RULES, dtype=jnp.float32)


def quantization_error(tiny, prompts, **settings):
    model, params = tiny
    config = DecodeConfig(slots=16, max_length=128, **settings)
    return measure_quantization_error(
        params,
        model.architecture,
        model.tokenizer,
        config,
        prompts,
        mesh=mesh_of(),
        compute_dtype="float32",
        max_tokens=64,
    )


def test_tiny_model_predicts_with_int8_as_without_but_not_with_4_bits(tiny, monkeypatch):
    prompts = [f"{verb} {word} and red." for verb in ("Swap", "Copy", "Join") for word in ("cat", "dog", "sun", "blue")]
    none = quantization_error(tiny, prompts)
    assert (none.divergence, none.loss, none.agreement) == (0, 0, 1)
    cache, both = quantization_error(tiny, prompts, kv_cache_dtype="int8"), quantization_error(tiny, prompts, **INT8)
    assert none.tokens == cache.tokens == both.tokens > 100
    for error in (cache, both):
        assert 0 < error.divergence < 1e-3
        assert abs(error.loss) < 0.01
        assert error.agreement > 0.95
    monkeypatch.setattr(quantization, "_LARGEST", 7)
    quantization.quantize.clear_cache()
    four_bits = quantization_error(tiny, prompts, weights_dtype="int8")
    quantization.quantize.clear_cache()
    assert four_bits.divergence > 5e-3


def test_weights_are_quantized_while_they_are_loaded(tiny):
    model, params = tiny
    mesh = mesh_of((1, 1, 2))
    loaded = load_parameters(
        model.directory, model.architecture, mesh=mesh, rules=DECODE_RULES, dtype=jnp.float32, weights_dtype="int8"
    )
    shapes = abstract_weights(model.architecture, "int8", jnp.float32)
    jax.tree.map(
        lambda x, shape: np.testing.assert_equal((x.shape, x.dtype), (shape.shape, shape.dtype)), loaded, shapes
    )
    rounded = dequantize_weights(loaded, model.architecture)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.6 * np.abs(b).max() / 127), rounded, params)


def test_prompts_that_do_not_fit_leave_nothing_to_compare(params):
    config = dataclasses.replace(DecodeConfig(slots=2, max_length=16), kv_cache_dtype="int8")
    with pytest.raises(UserError, match="no completion of the 1 prompts"):
        measure_quantization_error(params, ARCHITECTURE, TableTokenizer(), config, ["a" * 30], mesh=mesh_of())
