"""Integers with scales against the floats that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import small
from tiles import in_tiles

from isheep_jax.model.architecture import init_parameters, leaves, parameter_table
from isheep_jax.model.attention import cached_attention
from isheep_jax.model.attention_reference import AttentionConfig, cached_mask, reference_attention
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.quantization import (
    Quantized,
    abstract_weights,
    dequantize,
    dequantize_weights,
    put_weight,
    quantize,
    weight_table,
)
from isheep_jax.model.transformer import ForwardSetup, forward, logits
from isheep_jax.sharding import one_device_sharding

ARCHITECTURE = small(vocab_size=40, hidden_size=24, intermediate_size=36, heads=6, tied_embeddings=False)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2)])
def test_element_is_off_by_half_scale_at_most(axes):
    x = normal(5, 300, 7) * jnp.logspace(-6, 6, 7)
    found = quantize(x, axes)
    assert found.values.dtype == jnp.int8
    assert found.scale.shape == tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    error = np.abs(dequantize(found, axes) - x)
    scale = np.broadcast_to(np.expand_dims(found.scale, axes), x.shape)
    assert (error <= 0.5001 * scale).all()
    assert error.max() > 0.4 * scale[np.unravel_index(error.argmax(), x.shape)]  # it does round
    # The largest of each group keeps its value, and its sign.
    np.testing.assert_array_equal(np.abs(found.values).max(axis=axes), 127)
    np.testing.assert_array_equal(np.sign(found.values)[error < np.abs(x) / 2], np.sign(x)[error < np.abs(x) / 2])


def test_zeros_stay_zeros():
    found = quantize(jnp.zeros((3, 4)).at[1].set(2.0), (1,))
    np.testing.assert_array_equal(dequantize(found, (1,)), [[0] * 4, [2] * 4, [0] * 4])


def test_output_is_rounded_by_its_own_size():
    large = normal(8, 5).at[:, 0].multiply(1e4)
    alone, beside = quantize(large[:, 1:], (0,)), quantize(large, (0,))
    np.testing.assert_array_equal(alone.values, beside.values[:, 1:])


def test_matrix_has_scale_for_each_output():
    table = weight_table(ARCHITECTURE, "int8")
    layers = {name: spec.scale.axes for name, spec in table["layers"].items() if isinstance(spec, Quantized)}
    assert layers == {
        "wq": ("layers", "heads", "head_dim"),
        "wk": ("layers", "kv_heads", "head_dim"),
        "wv": ("layers", "kv_heads", "head_dim"),
        "wo": ("layers", "embed"),
        "w_gate": ("layers", "ffn"),
        "w_up": ("layers", "ffn"),
        "w_down": ("layers", "embed"),
    }
    assert table["embed"].scale.axes == table["lm_head"].scale.axes == ("vocab",)
    assert table["final_norm"] == parameter_table(ARCHITECTURE)["final_norm"]
    assert weight_table(ARCHITECTURE, "model") == parameter_table(ARCHITECTURE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_quantized_weights_give_what_their_floats_give(family, tied):
    architecture = dataclasses.replace(ARCHITECTURE, family=family, tied_embeddings=tied)
    params = jax.tree.map(lambda x: 5 * x, init_parameters(architecture, jax.random.key(0)))
    place = jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), weight_table(architecture, "int8")
    )
    quantized = jax.tree.map(
        lambda spec, leaf, where: put_weight(spec, leaf, where, jnp.float32),
        parameter_table(architecture),
        params,
        place,
    )
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), quantized)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_weights(architecture, "int8", jnp.float32))
    rounded = dequantize_weights(quantized, architecture)
    for path, spec in leaves(parameter_table(architecture)):
        before, after = params, rounded
        for key in path:
            before, after = before[key], after[key]
        if spec.is_matrix:
            error = np.abs(before - after)
            assert 0 < error.max() < 0.6 * np.abs(before).max() / 127
        else:
            np.testing.assert_array_equal(before, after)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)

    @jax.jit
    def run(params):
        hidden, _ = forward(params, architecture, tokens, jnp.arange(9)[None], ForwardSetup(jnp.float32))
        return logits(params, architecture, hidden, jnp.float32)

    found, expected, exact = run(quantized), run(rounded), run(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - exact).max() > 10 * np.abs(found - expected).max()  # rounding is what is left


def integer_cache(rows, length, kv_heads=2, width=8):
    """Random keys and values [1, rows, length, ...] as a cache of integers, and as the floats that it stands for."""
    k, v = (
        quantize(
            normal(1, rows, length, kv_heads, width, seed=seed) * 10.0 ** normal(1, rows, length, 1, 1, seed=9), (4,)
        )
        for seed in (1, 2)
    )
    numbers = (x.values.reshape(1, rows, length, -1) for x in (k, v))
    return KVCache(*numbers, k.scale, v.scale), dequantize(k, (4,))[0], dequantize(v, (4,))[0]


@pytest.mark.parametrize(
    ("rows", "window", "softcap", "tile"),
    [(3, None, None, 0), (16, 30, None, 0), (16, None, 2.0, 0), (16, 30, 2.0, 64)],
)
def test_attention_to_cache_of_integers_is_attention_to_its_floats(rows, window, softcap, tile):
    cache, k, v = integer_cache(rows, 192)
    cache = in_tiles(cache, tile, 8)
    q = normal(rows, 1, 6, 8)
    at = jnp.linspace(0, 191, rows).astype(jnp.int32)[:, None]
    found = cached_attention(
        q,
        cache,
        jnp.asarray(0),
        AttentionConfig(0.3, softcap, (window,)),
        jnp.asarray(0),
        positions=at,
        cache_positions=at,
        key_limit=0,
        prefix_kv=(),
        sharding=one_device_sharding(),
    )
    expected = reference_attention(q, k, v, cached_mask(at, jnp.arange(192), window), AttentionConfig(0.3, softcap))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
