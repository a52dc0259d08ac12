"""The forward pass against Hugging Face's models (fixtures): plainly, through a cache, and in packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from isheep_jax.model.kv_cache import CacheWrite, init_cache
from isheep_jax.model.transformer import logits, rope_frequencies

GREEDY_TOKENS = 10  # of make_fixtures.py
# Scaled RoPE; windows, two RoPE bases and four norms; biases and windows in some layers.
VARIED = ("llama_scaled_rope", "gemma3", "qwen2_window")


def assert_near(ours, theirs, tolerance=1e-4):
    """Equal within `tolerance` of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * parity.largest(theirs))


@pytest.mark.parametrize("name", parity.NAMES)
def test_logits_loss_and_gradient_equal_hugging_faces_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    tokens, labels = jnp.asarray(expected["tokens"]), jnp.asarray(expected["labels"])

    assert_near(parity.plain_logits(params, architecture, tokens), expected["logits"])
    loss, gradient = jax.jit(jax.value_and_grad(parity.mean_loss), static_argnums=1)(
        params, architecture, tokens, labels
    )
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    ours = parity.by_huggingface_name(gradient, architecture)
    theirs = {k.removeprefix("gradient."): v for k, v in expected.items() if k.startswith("gradient.")}
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_allclose(ours[tensor], value, rtol=0, atol=1e-4 * parity.largest(value), err_msg=tensor)


@pytest.mark.parametrize("name", VARIED)
def test_prefill_and_decode_give_hugging_faces_logits_and_greedy_tokens_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    tokens = jnp.asarray(expected["tokens"])
    positions = parity.plain_positions(tokens)
    # The prompt ends before the original context does where RoPE is scaled, and decoding goes far past it.
    prompt, length = 12, tokens.shape[1]
    # Keys that an earlier request left in the cache are not seen.
    cache = jax.tree.map(lambda x: x + 100.0, init_cache(architecture, tokens.shape[0], length, jnp.float32))
    pieces = []
    for part in (slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, length))):
        write = CacheWrite(cache, positions[:, part])
        hidden, cache = parity.forward(params, architecture, tokens[:, part], positions[:, part], cache=write)
        pieces.append(hidden)
    assert_near(logits(params, architecture, jnp.concatenate(pieces, 1), jnp.float32), expected["logits"])

    greedy = expected["greedy"]
    start = greedy.shape[1] - GREEDY_TOKENS
    ours = np.array(parity.plain_logits(params, architecture, jnp.asarray(greedy)))[:, start - 1 : -1]
    ours[..., architecture.eos_token_ids] = -np.inf  # the expected ones were made to go on
    np.testing.assert_array_equal(ours.argmax(-1), greedy[:, start:])


@pytest.mark.parametrize("name", VARIED)
def test_packed_segments_and_padding_give_logits_of_rows_alone_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    row, half = expected["tokens"][0], expected["tokens"].shape[1] // 2
    # Two pieces of the row in the other order, and padding that says no.
    packed = np.concatenate([row[half:], row[:half], [0, 0, 0]])[None]
    rest = len(row) - half
    segments = np.concatenate([np.full(rest, 1), np.full(half, 2), np.zeros(3)])[None].astype(np.int32)
    positions = np.concatenate([np.arange(rest), np.arange(half), np.zeros(3)])[None].astype(np.int32)
    hidden, _ = parity.forward(params, architecture, packed, positions, segment_ids=segments)
    ours = logits(params, architecture, hidden, jnp.float32)[0]
    assert_near(ours[rest : rest + half], expected["logits"][0, :half])
    alone = parity.plain_logits(params, architecture, jnp.asarray(row[None, half:]))[0]
    assert_near(ours[:rest], alone)


@pytest.mark.parametrize("name", VARIED)
def test_prompt_behind_padding_gives_its_own_logits_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    row, length = expected["tokens"][:1], expected["tokens"].shape[1]
    # Padding before the prompt writes nothing and is seen by nothing, whatever tokens stand there.
    padded = np.concatenate([np.full((1, 5), 7, np.int32), row], axis=1)
    positions = np.concatenate([np.full(5, -1), np.arange(length)])[None].astype(np.int32)
    write = CacheWrite(init_cache(architecture, 1, length + 3, jnp.float32), positions)
    hidden, _ = parity.forward(params, architecture, padded, positions, cache=write)
    assert_near(logits(params, architecture, hidden, jnp.float32)[:, 5:], expected["logits"][:1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"query_scalar": None}),
        ("gemma2", {"windowed_layers": (0, 1, 2)}),
        ("gemma3", {"window": 8}),
        ("gemma3", {"windowed_layers": (0, 1)}),
        ("gemma3", {"window_rope_theta": 5000.0}),
        ("gemma3", {"rope_scaling": None}),
        ("qwen2", {"family": "llama"}),
        ("qwen2_window", {"windowed_layers": (0,)}),
        ("mistral", {"window": None, "windowed_layers": ()}),
        ("olmo2", {"norm_eps": 0.1}),
        ("llama_linear_rope", {"rope_scaling": None}),
        ("llama_scaled_rope", {"rope_theta": 10_000.0}),
    ],
)
def test_fixtures_notice_each_peculiarity(name, changes):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    other = dataclasses.replace(architecture, **changes)
    theirs = expected["logits"]
    ours = parity.plain_logits(params, other, jnp.asarray(expected["tokens"]))
    assert parity.largest(np.asarray(ours) - theirs) > 1e-2 * parity.largest(theirs)


def test_scaled_fixture_would_notice_rope_without_its_scaling():
    architecture, params = parity.load(parity.FIXTURES / "llama_scaled_rope")
    expected = parity.expected("llama_scaled_rope")
    plain = dataclasses.replace(architecture, rope_scaling=None)
    difference = np.abs(parity.plain_logits(params, plain, jnp.asarray(expected["tokens"])) - expected["logits"])
    assert difference.max() > 0.1
    scaled = rope_frequencies(16, architecture.rope_theta, architecture.rope_scaling)
    ratio = np.asarray(rope_frequencies(16, architecture.rope_theta, None) / scaled)
    # Some frequencies stay, some are stretched by the whole factor, some lie between.
    assert ratio.min() == 1
    np.testing.assert_allclose(ratio.max(), 8, rtol=1e-6)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_recomputing_activations_gives_same_gradient():
    architecture, params = parity.load(parity.FIXTURES / "gemma3")
    tokens = jnp.asarray(parity.expected("gemma3")["tokens"])

    def loss(params, remat):
        hidden, _ = parity.forward(params, architecture, tokens, parity.plain_positions(tokens), remat=remat)
        return jnp.mean(jnp.square(logits(params, architecture, hidden, jnp.float32)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, "none")
    for remat in ("full", "selective"):
        recomputed = gradient(params, remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, recomputed)


def test_bfloat16_stays_near_float32():
    architecture, params = parity.load(parity.FIXTURES / "llama")
    tokens = jnp.asarray(parity.expected("llama")["tokens"])
    expected = parity.plain_logits(params, architecture, tokens)
    rounded = parity.plain_logits(params, architecture, tokens, jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(rounded - expected).max() < 0.05 * np.abs(expected).max()
