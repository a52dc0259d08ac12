import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import mesh_of
from tpu_programs import needs_libtpu, run_program

from isheep_jax.decode.sampling import (
    GENERATED,
    PROMPT,
    DeviceSamplingParams,
    logprobs_of,
    penalize,
    request_key,
    sample,
    top_k_floor,
)

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_k": 7},
    {"min_p": 0.1},
    {"top_k": 10, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.05, "temperature": 1.3},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 2.0},
]
compiled_sample = jax.jit(sample, static_argnames="mesh")


def run(*arguments, mesh=None):
    return compiled_sample(*arguments, mesh=mesh or mesh_of())


def settings_of(**values) -> DeviceSamplingParams:
    return DeviceSamplingParams(**{k: np.int32(v) if k == "top_k" else np.float32(v) for k, v in values.items()})


@functools.cache
def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return np.stack([request_key(seed, f"r{i}") for i in range(count)])


def exact_distribution(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> np.ndarray:
    """By sorting, in float64. Tokens of equal probability are in or out together."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    floor = 0.0
    if top_k:
        floor = np.sort(weights)[-min(top_k, len(weights))]
    total = weights[weights >= floor].sum()
    allowed = weights >= max(floor, min_p)
    if top_p < 1:
        ordered = np.sort(weights)
        from_top = np.append(np.cumsum(ordered[::-1])[::-1], 0.0)
        above = from_top[np.searchsorted(ordered, weights, side="right")]
        # To the digits that float32 sums have: a nucleus that is reached exactly takes no further token.
        allowed &= (above < top_p * total * (1 - 1e-6)) | (above == 0)
    probability = np.where(allowed, weights, 0.0)
    return probability / probability.sum()


def draws(logits: np.ndarray, count: int, positions=None, seed: int = 0, **values) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    if positions is None:
        return np.asarray(run(rows, keys_of(count, seed), np.full(count, 7, np.int32), settings_of(**values)))
    keys = np.tile(request_key(seed, "r"), (count, 1))
    return np.asarray(run(rows, keys, positions, settings_of(**values)))


def chi_square_fits(counts: np.ndarray, probability: np.ndarray) -> bool:
    expected = probability * counts.sum()
    inside = expected > 0
    if counts[~inside].any():
        return False
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = inside.sum() - 1
    # Mean and variance of chi-square are its degrees of freedom and twice that; the draws are fixed by the seed.
    return statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize("vary", ["request", "position"])
def test_samples_follow_exact_distribution(values, vary):
    logits = np.random.default_rng(1).normal(0, 1.5, 40).astype(np.float32)
    positions = np.arange(20_000, dtype=np.int32) if vary == "position" else None
    counts = np.bincount(draws(logits, 20_000, positions, seed=3, **values), minlength=40)
    assert chi_square_fits(counts, exact_distribution(logits, **values))


def test_slightly_wrong_distribution_is_noticed():
    logits = np.random.default_rng(1).normal(0, 1.5, 40).astype(np.float32)
    counts = np.bincount(draws(logits, 20_000, seed=3, temperature=1.1), minlength=40)
    assert chi_square_fits(counts, exact_distribution(logits, temperature=1.1))
    assert not chi_square_fits(counts, exact_distribution(logits))


@pytest.mark.parametrize("vocabulary", [4096, 5003])
def test_samples_are_exact_over_many_blocks_and_with_indivisible_vocabulary(vocabulary):
    logits = np.random.default_rng(5).normal(0, 1, vocabulary).astype(np.float32)
    for values in ({}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.7}):
        tokens = np.concatenate([draws(logits, 4000, seed=s, **values) for s in range(2)])
        probability = exact_distribution(logits, **values)
        assert (probability[tokens] > 0).all()
        # Neighbors and tokens of like probability, fifty cells of each sort.
        for order in (np.arange(vocabulary), np.argsort(probability)):
            cells = np.array_split(order, 50)
            counts = np.bincount(tokens, minlength=vocabulary)
            folded = [np.array([x[cell].sum() for cell in cells]) for x in (counts, probability)]
            assert chi_square_fits(*folded), values


@pytest.mark.parametrize("vocabulary", [1, 7, 33, 128, 200])
def test_allowed_tokens_are_those_of_plain_sort_with_ties_in_or_out_together(vocabulary):
    rng = np.random.default_rng(vocabulary)
    for case in range(2):
        # Few values, so that every border falls on a tie.
        logits = rng.integers(0, 5, vocabulary).astype(np.float32) * 0.2
        for values in FILTERS:
            allowed = np.flatnonzero(exact_distribution(logits, **values))
            sampled = np.unique(draws(logits, 4096, seed=case, **values))
            np.testing.assert_array_equal(sampled, allowed, err_msg=f"{case} {values}")


def test_nucleus_that_is_reached_exactly_takes_no_further_token():
    logits = np.log(np.array([4, 2, 1, 1], np.float32))
    assert set(draws(logits, 500, top_p=0.75).tolist()) == {0, 1}
    assert set(draws(logits, 500, top_p=0.76).tolist()) == {0, 1, 2, 3}
    assert set(draws(logits, 500, top_p=0.74).tolist()) == {0, 1}


@pytest.mark.parametrize("values", [{"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_most_probable_tokens_are_always_in(values):
    logits = np.zeros(50, np.float32)
    logits[[3, 30]] = 0.5
    assert set(draws(logits, 500, **values).tolist()) == {3, 30}


def test_top_k_beyond_vocabulary_and_beyond_possible_tokens_keeps_all():
    logits = np.full(10, -np.inf, np.float32)
    logits[[2, 5]] = [0.0, 1.0]
    for k in (3, 10, 1000):
        assert set(draws(logits, 500, top_k=k).tolist()) == {2, 5}


@pytest.mark.parametrize("k", [1, 2, 20, 50, 127, 2000])
def test_top_k_floor_parts_k_largest_from_rest(k):
    rng = np.random.default_rng(k)
    weights = rng.random((30, 1024)).astype(np.float32) ** 8
    weights[:10] = np.round(weights[:10], 2)  # ties
    weights[10:20, :64] += np.float32(0.9) * (1 - weights[10:20, :64])  # the largest side by side
    weights[20:25] = np.sort(weights[20:25], axis=-1)
    floor = np.asarray(jax.jit(top_k_floor)(weights, np.int32(k)))
    kth = np.sort(weights, axis=-1)[:, -min(k, 1024)][:, None]
    np.testing.assert_array_equal(weights > floor, (weights >= kth) & (weights > 0))


@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_row_does_not_depend_on_its_neighbors(values):
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (32, 300)).astype(np.float32) * rng.choice([0.1, 1, 5], (32, 1)).astype(np.float32)
    keys, positions = keys_of(32), rng.integers(0, 1000, 32).astype(np.int32)
    whole = np.asarray(run(logits, keys, positions, settings_of(**values)))
    order = rng.permutation(32)
    moved = np.asarray(run(logits[order], keys[order], positions[order], settings_of(**values)))
    np.testing.assert_array_equal(moved, whole[order])
    for row in (0, 13):
        alone = run(logits[[row]], keys[[row]], positions[[row]], settings_of(**values))
        assert int(alone[0]) == whole[row]


@pytest.mark.parametrize("vocabulary", [128, 1024, 5024])
def test_mesh_of_eight_samples_tokens_of_one_device(vocabulary):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, (64, vocabulary)).astype(np.float32)
    seen = rng.integers(0, 4, logits.shape).astype(np.uint8)
    keys, positions = keys_of(64), np.arange(64, dtype=np.int32)
    for values in (*FILTERS, {"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.2}):
        settings = settings_of(**values)
        one = run(logits, keys, positions, settings, seen)
        rows = put(logits, "data", "tensor"), put(keys, "data"), put(positions, "data")
        eight = run(*rows, settings, put(seen, "data", "tensor"), mesh=mesh)
        same = np.asarray(one) == np.asarray(eight)
        assert same.mean() >= 63 / 64, values  # the order of a sum may move one draw across a border
        tokens = np.asarray(eight)
        one_logprobs, eight_logprobs = logprobs_of(logits, tokens), jax.jit(logprobs_of)(rows[0], put(tokens, "data"))
        np.testing.assert_allclose(one_logprobs, eight_logprobs, atol=1e-5)


# In a process of its own: it needs what libtpu reads from the environment when it is loaded.
COMPILE = """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from isheep_jax.decode.sampling import DeviceSamplingParams, sample
    from isheep_jax.planning.hardware import prepare_environment, slice_devices

    prepare_environment("v4-64")
    devices = np.array(slice_devices("v4-64", 1)).reshape(8, 4)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    B, V = 512, 151936
    where = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    settings = jax.tree.map(lambda x: where((), x.dtype), DeviceSamplingParams())
    arguments = (where((B, V), jnp.float32, "data", "tensor"), where((B, 2), jnp.uint32, "data"),
                 where((B,), jnp.int32, "data"), settings, where((B, V), jnp.uint8, "data", "tensor"))
    compiled = jax.jit(sample, static_argnames="mesh").lower(*arguments, mesh=mesh).compile()
    text = compiled.as_text()
    assert not re.search(r" sort\\(", text)
    gathered = re.findall(r"= \\(?\\w+\\[([\\d,]*)\\]\\S* (?:all-gather|all-to-all)", text)
    assert gathered
    for shape in gathered:
        assert np.prod([int(n) for n in shape.split(",")]) <= B // 8 * 128, shape
    weights = B // 8 * V // 4 * 4  # bytes on a device
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * weights, compiled.memory_analysis()
    print("compiled")
"""


@pytest.mark.tpu_compile
@needs_libtpu
def test_sharded_vocabulary_is_neither_gathered_nor_sorted_on_tpu():
    assert run_program(COMPILE) == ["compiled"]


@functools.cache
def penalty_case() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    return rng.normal(0, 2, (16, 50)).astype(np.float32), rng.integers(0, 4, (16, 50)).astype(np.uint8)


def reference_penalties(logits, seen, repetition=1.0, presence=0.0) -> np.ndarray:
    logits = logits.astype(np.float64).copy()
    for row, bits in zip(logits, seen, strict=True):
        for token in np.flatnonzero(bits):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
            row[token] -= presence if bits[token] & GENERATED else 0.0
    return logits


@pytest.mark.parametrize(("repetition", "presence"), [(1.5, 0.0), (0.8, 0.0), (1.0, 0.7), (1.2, -0.5), (1.0, 0.0)])
def test_penalties_fall_on_seen_tokens_only(repetition, presence):
    logits, seen = penalty_case()
    settings = settings_of(repetition_penalty=repetition, presence_penalty=presence)
    expected = reference_penalties(logits, seen, repetition, presence)
    np.testing.assert_allclose(penalize(logits, settings, seen), expected, atol=1e-6)


def test_presence_penalty_spares_prompt_and_repetition_penalty_does_not():
    logits = np.array([[2.0, 2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[0, PROMPT, GENERATED, PROMPT | GENERATED]], np.uint8)
    presence = penalize(logits, settings_of(presence_penalty=0.5), seen)
    np.testing.assert_array_equal(presence, [[2.0, 2.0, 1.5, -2.5]])
    repetition = penalize(logits, settings_of(repetition_penalty=2.0), seen)
    np.testing.assert_array_equal(repetition, [[2.0, 1.0, 1.0, -4.0]])


def test_temperature_zero_takes_most_probable_token_after_penalties():
    logits, seen = penalty_case()
    plain = run(logits, keys_of(16), np.arange(16, dtype=np.int32), settings_of(temperature=0.0, top_p=0.5))
    np.testing.assert_array_equal(plain, logits.argmax(-1))
    settings = settings_of(temperature=0.0, repetition_penalty=1.8, presence_penalty=1.5)
    penalized = run(logits, keys_of(16), np.arange(16, dtype=np.int32), settings, seen)
    expected = reference_penalties(logits, seen, 1.8, 1.5).argmax(-1)
    assert (expected != logits.argmax(-1)).any()
    np.testing.assert_array_equal(penalized, expected)


def test_samples_with_penalties_follow_penalized_distribution():
    logits, seen = (x[0] for x in penalty_case())
    rows = [np.broadcast_to(x, (20_000, 50)) for x in (logits, seen)]
    settings = settings_of(repetition_penalty=1.4, presence_penalty=0.6, top_p=0.9, temperature=1.2)
    tokens = run(rows[0], keys_of(20_000), np.zeros(20_000, np.int32), settings, rows[1])
    penalized = reference_penalties(logits[None], seen[None], 1.4, 0.6)[0]
    counts = np.bincount(tokens, minlength=50)
    assert chi_square_fits(counts, exact_distribution(penalized, temperature=1.2, top_p=0.9))
    assert not chi_square_fits(counts, exact_distribution(logits, temperature=1.2, top_p=0.9))


@pytest.mark.parametrize("vocabulary", [10, 300, 4099])
def test_token_that_cannot_occur_is_never_sampled(vocabulary):
    logits = np.full(vocabulary, -np.inf, np.float32)
    logits[[3, vocabulary - 2]] = 0.0
    for values in ({}, {"top_p": 0.9}, {"temperature": 100.0}):
        assert set(draws(logits, 500, **values).tolist()) == {3, vocabulary - 2}


@pytest.mark.parametrize("logit", [np.nan, -np.inf, np.inf])
def test_logits_that_are_no_numbers_end_in_some_token(logit):
    logits = np.full((4, 200), logit, np.float32)
    for values in FILTERS:
        tokens = np.asarray(run(logits, keys_of(4), np.zeros(4, np.int32), settings_of(**values)))
        assert ((tokens >= 0) & (tokens < 200)).all()


def test_logprobs_are_those_of_softmax_without_temperature_and_penalties():
    rng = np.random.default_rng(9)
    logits, tokens = rng.normal(0, 5, (20, 333)).astype(np.float32), rng.integers(0, 333, 20)
    wide = logits.astype(np.float64)
    expected = np.take_along_axis(wide - np.log(np.exp(wide).sum(-1, keepdims=True)), tokens[:, None], -1)[:, 0]
    np.testing.assert_allclose(jax.jit(logprobs_of)(logits, tokens), expected, atol=1e-5)


def test_stages_share_one_compilation():
    logits = np.zeros((3, 64), np.float32)
    counted = jax.jit(lambda *arguments: sample(*arguments, mesh=mesh_of()))
    for values in (*FILTERS, {"temperature": 0.0}):
        counted(logits, keys_of(3), np.zeros(3, np.int32), settings_of(**values))
    assert counted._cache_size() == 1


def test_key_is_decided_by_seed_and_id():
    keys = {tuple(request_key(seed, name)) for seed in (0, 1) for name in ("a", "b", "1")}
    assert len(keys) == 6
    assert tuple(request_key(1, "a")) == tuple(request_key(1, "a"))
