import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from architectures import small
from meshes import mesh_of

from isheep_jax.model.architecture import RopeScaling, init_parameters, parameter_table
from isheep_jax.model.kv_cache import init_cache
from isheep_jax.model.transformer import LINEAR_LEAVES, forward, logits, rope_frequencies
from isheep_jax.sharding import DECODE_RULES, TRAIN_RULES, batch_sharding, param_shardings

ARCHITECTURE = small(
    family="qwen2",
    vocab_size=48,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)


GREEDY_TOKENS = 10  # of make_fixtures.py


@pytest.fixture(scope="module")
def params():
    start = init_parameters(ARCHITECTURE, jax.random.key(0))
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, 12), 0, ARCHITECTURE.vocab_size)


compiled = jax.jit(forward, static_argnums=1, static_argnames=("compute_dtype", "remat", "lora_scale", "lora_dropout"))


def run(params, tokens, positions, architecture=ARCHITECTURE, **options):
    return compiled(params, architecture, tokens, positions, compute_dtype=jnp.float32, **options)


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


@pytest.mark.parametrize("name", parity.NAMES)
def test_prefill_and_decode_give_hugging_faces_logits_and_greedy_tokens_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    tokens = jnp.asarray(expected["tokens"])
    positions = parity.plain_positions(tokens)
    # The prompt ends before the original context does where RoPE is scaled, and decoding goes far past it.
    prompt, length = 12, tokens.shape[1]
    cache = init_cache(architecture, tokens.shape[0], length, jnp.float32)
    hidden, cache = run(params, tokens[:, :prompt], positions[:, :prompt], architecture, cache=cache)
    pieces = [hidden]
    for i in range(prompt, length):
        hidden, cache = run(params, tokens[:, i : i + 1], positions[:, i : i + 1], architecture, cache=cache)
        pieces.append(hidden)
    assert_near(logits(params, architecture, jnp.concatenate(pieces, 1), jnp.float32), expected["logits"])

    greedy = expected["greedy"]
    start = greedy.shape[1] - GREEDY_TOKENS
    scores = np.array(parity.plain_logits(params, architecture, jnp.asarray(greedy)))[:, start - 1 : -1]
    scores[..., architecture.eos_token_ids] = -np.inf  # the expected ones were made to go on
    np.testing.assert_array_equal(scores.argmax(-1), greedy[:, start:])


@pytest.mark.parametrize("name", parity.NAMES)
def test_packed_segments_and_padding_give_the_logits_of_rows_alone_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    row, half = expected["tokens"][0], expected["tokens"].shape[1] // 2
    # Two pieces of the row in the other order, and padding that says no.
    packed = np.concatenate([row[half:], row[:half], [0, 0, 0]])[None]
    rest = len(row) - half
    segments = np.concatenate([np.full(rest, 1), np.full(half, 2), np.zeros(3)])[None].astype(np.int32)
    positions = np.concatenate([np.arange(rest), np.arange(half), np.zeros(3)])[None].astype(np.int32)
    hidden, _ = run(params, packed, positions, architecture, segment_ids=segments)
    ours = logits(params, architecture, hidden, jnp.float32)[0]
    assert_near(ours[rest : rest + half], expected["logits"][0, :half])
    alone = parity.plain_logits(params, architecture, jnp.asarray(row[None, half:]))[0]
    assert_near(ours[:rest], alone)


@pytest.mark.parametrize("name", parity.NAMES)
def test_a_prompt_behind_left_over_padding_gives_its_own_logits_on_fixtures(name):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    row, length = expected["tokens"][:1], expected["tokens"].shape[1]
    # Padding before the prompt writes nothing and is seen by nothing, whatever tokens stand there.
    padded = np.concatenate([np.full((1, 5), 7, np.int32), row], axis=1)
    positions = np.concatenate([np.full(5, -1), np.arange(length)])[None].astype(np.int32)
    cache = init_cache(architecture, 1, length + 3, jnp.float32)
    hidden, _ = run(params, padded, positions, architecture, cache=cache)
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
def test_the_fixtures_notice_each_peculiarity(name, changes):
    architecture, params = parity.load(parity.FIXTURES / name)
    expected = parity.expected(name)
    other = dataclasses.replace(architecture, **changes)
    theirs = expected["logits"]
    ours = parity.plain_logits(params, other, jnp.asarray(expected["tokens"]))
    assert parity.largest(np.asarray(ours) - theirs) > 1e-2 * parity.largest(theirs)


def test_the_scaled_fixture_would_notice_rope_without_its_scaling():
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


def test_linear_rope_scaling_is_the_plain_one_at_divided_positions(params, tokens):
    linear = dataclasses.replace(ARCHITECTURE, rope_scaling=RopeScaling("linear", 4.0))
    plain = dataclasses.replace(ARCHITECTURE, rope_scaling=None)
    positions = parity.plain_positions(tokens)
    stretched, _ = run(params, tokens, 4 * positions, linear)
    expected, _ = run(params, tokens, positions, plain)
    np.testing.assert_allclose(stretched, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [(7, 1, 1, 1, 1, 1), (5, 4, 3), (12,), (1,) * 12])
def test_cached_prefill_and_decode_equal_the_full_forward(params, tokens, pieces):
    positions = parity.plain_positions(tokens)
    expected, _ = run(params, tokens, positions)
    cache, hidden, start = init_cache(ARCHITECTURE, 3, 16, jnp.float32), [], 0
    for size in pieces:
        part = slice(start, start + size)
        h, cache = run(params, tokens[:, part], positions[:, part], cache=cache)
        hidden.append(h)
        start += size
    np.testing.assert_allclose(jnp.concatenate(hidden, 1), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_unequal_length_decode_as_if_alone(params, tokens):
    lengths = (12, 5, 9)
    positions = parity.plain_positions(tokens)
    padded = jnp.where(positions < jnp.asarray(lengths)[:, None], positions, -1)
    _, cache = run(params, tokens, padded, cache=init_cache(ARCHITECTURE, 3, 16, jnp.float32))
    following, _ = run(params, tokens[:, :1], jnp.asarray(lengths)[:, None], cache=cache)
    for row, length in enumerate(lengths):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, :1]])[None]
        expected, _ = run(params, alone, parity.plain_positions(alone))
        np.testing.assert_allclose(following[row, 0], expected[0, -1], rtol=1e-4, atol=1e-5)


def test_positions_outside_the_cache_write_nothing(params, tokens):
    _, before = run(params, tokens, parity.plain_positions(tokens), cache=init_cache(ARCHITECTURE, 3, 12, jnp.float32))
    _, after = run(params, tokens[:, :2], jnp.asarray([[-1, 12]] * 3), cache=before)
    np.testing.assert_array_equal(before.k, after.k)
    np.testing.assert_array_equal(before.v, after.v)


def test_a_slots_old_keys_are_not_seen_by_a_new_request(params, tokens):
    dirty = jax.tree.map(lambda x: x + 100.0, init_cache(ARCHITECTURE, 3, 16, jnp.float32))
    positions = parity.plain_positions(tokens)
    expected, _ = run(params, tokens, positions)
    hidden, _ = run(params, tokens, positions, cache=dirty)
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)


def test_packed_segments_equal_separate_rows(params, tokens):
    first, second = tokens[:1, :7], tokens[1:2, :4]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 7 + [2] * 4 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(4), *range(3)]])
    hidden, _ = run(params, packed, positions, segment_ids=segments)
    for part, row in ((slice(0, 7), first), (slice(7, 11), second)):
        expected, _ = run(params, row, parity.plain_positions(row))
        np.testing.assert_allclose(hidden[:, part], expected, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_gives_the_same_gradient(params, tokens):
    def loss(params, remat):
        hidden, _ = run(params, tokens, parity.plain_positions(tokens), remat=remat)
        return jnp.mean(jnp.square(logits(params, ARCHITECTURE, hidden, jnp.float32)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, recomputed = gradient(params, "none"), gradient(params, "full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, recomputed)


def adapters(rank=3, zero_b=False):
    table = parameter_table(ARCHITECTURE)["layers"]
    tree = {}
    for i, name in enumerate(LINEAR_LEAVES):
        layers, *shape = table[name].shape
        inputs = shape[:2] if name == "wo" else shape[:1]
        outputs = shape[len(inputs) :]
        a, b = jax.random.split(jax.random.key(i))
        tree[name] = {
            "a": jax.random.normal(a, (layers, int(np.prod(inputs)), rank)).reshape(layers, *inputs, rank),
            "b": (0.0 if zero_b else 0.1) * jax.random.normal(b, (layers, rank, *outputs)),
        }
    return {"layers": tree}


def merged(params, lora, scale):
    sides = {"wo": "lnhr,lrd->lnhd", "wq": "ldr,lrnh->ldnh", "wk": "ldr,lrnh->ldnh", "wv": "ldr,lrnh->ldnh"}
    layers = dict(params["layers"])
    for name, leaf in lora["layers"].items():
        layers[name] += scale * jnp.einsum(sides.get(name, "lir,lro->lio"), leaf["a"], leaf["b"])
    return {**params, "layers": layers}


def test_adapters_equal_merged_weights_and_a_zero_one_changes_nothing(params, tokens):
    positions = parity.plain_positions(tokens)
    lora = adapters()
    adapted, _ = run(params, tokens, positions, lora=lora, lora_scale=0.5)
    expected, _ = run(merged(params, lora, 0.5), tokens, positions)
    np.testing.assert_allclose(adapted, expected, rtol=1e-3, atol=1e-4)
    base, _ = run(params, tokens, positions)
    unchanged, _ = run(params, tokens, positions, lora=adapters(zero_b=True), lora_scale=0.5)
    np.testing.assert_array_equal(unchanged, base)
    assert np.abs(adapted - base).max() > 0.1


def test_adapter_dropout_needs_a_key_and_differs_between_keys(params, tokens):
    def hidden(**options):
        return run(params, tokens, parity.plain_positions(tokens), lora=adapters(), lora_dropout=0.5, **options)[0]

    without, again = hidden(), hidden()
    np.testing.assert_array_equal(without, again)
    one, two = (
        hidden(dropout_key=jax.random.key_data(jax.random.key(1))),
        hidden(dropout_key=jax.random.key_data(jax.random.key(2))),
    )
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, hidden(dropout_key=jax.random.key_data(jax.random.key(1))))


def on_eight(params, tokens, sizes, rules):
    mesh = mesh_of(sizes)
    params = jax.device_put(params, param_shardings(parameter_table(ARCHITECTURE), mesh, rules))
    return params, jax.device_put(tokens, batch_sharding(mesh, rules))


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        *(((d, f, t), TRAIN_RULES) for d, f, t in [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]),
        ((4, 1, 2), DECODE_RULES),
    ],
)
def test_eight_devices_equal_one(params, sizes, rules):
    tokens = jax.random.randint(jax.random.key(3), (8, 10), 0, ARCHITECTURE.vocab_size)
    expected = parity.plain_logits(params, ARCHITECTURE, tokens)
    sharded, rows = on_eight(params, tokens, sizes, rules)
    np.testing.assert_allclose(parity.plain_logits(sharded, ARCHITECTURE, rows), expected, rtol=1e-4, atol=1e-5)


def test_eight_devices_decode_from_a_cache_like_one(params):
    tokens = jax.random.randint(jax.random.key(3), (8, 10), 0, ARCHITECTURE.vocab_size)
    expected, _ = run(params, tokens, parity.plain_positions(tokens))
    sharded, rows = on_eight(params, tokens, (4, 1, 2), DECODE_RULES)
    positions = parity.plain_positions(rows)
    cache = init_cache(ARCHITECTURE, 8, 10, jnp.float32)
    _, cache = run(sharded, rows[:, :9], positions[:, :9], cache=cache)
    last, _ = run(sharded, rows[:, 9:], positions[:, 9:], cache=cache)
    np.testing.assert_allclose(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32(params, tokens):
    expected = parity.plain_logits(params, ARCHITECTURE, tokens)
    hidden = parity.plain_logits(params, ARCHITECTURE, tokens, jnp.bfloat16)
    assert hidden.dtype == jnp.float32
    assert np.abs(hidden - expected).max() < 0.05 * np.abs(expected).max()
