import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isheep_jax.decode.sampling import nucleus_threshold, request_key, sample


def exact_distribution(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Sort, cut where the mass reaches top_p, renormalise, in float64; for logits without ties."""
    probability = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probability /= probability.sum()
    order = np.argsort(-probability)
    kept = order[: np.searchsorted(np.cumsum(probability[order]), top_p) + 1]
    nucleus = np.zeros_like(probability)
    nucleus[kept] = probability[kept]
    return nucleus / nucleus.sum()


def draws(logits: np.ndarray, keys: np.ndarray, positions: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits), (len(positions), len(logits)))
    return np.asarray(jax.jit(sample)(rows, keys, positions, np.float32(temperature), np.float32(top_p)))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (1.0, 0.99)])
@pytest.mark.parametrize("vary", ["request", "position"])
def test_draws_follow_the_exact_nucleus_distribution(temperature, top_p, vary):
    logits = np.random.default_rng(1).normal(0, 1.5, 40).astype(np.float32)
    count = 20_000
    if vary == "request":
        keys, positions = np.stack([request_key(3, f"r{i}") for i in range(count)]), np.full(count, 7, np.int32)
    else:
        keys, positions = np.tile(request_key(3, "r"), (count, 1)), np.arange(count, dtype=np.int32)
    seen = np.bincount(draws(logits, keys, positions, temperature, top_p), minlength=40)
    expected = exact_distribution(logits, temperature, top_p) * count
    assert not seen[expected == 0].any()
    inside = expected > 0
    statistic = ((seen - expected)[inside] ** 2 / expected[inside]).sum()
    freedom = inside.sum() - 1
    # Mean and variance of chi-square are its degrees of freedom and twice that; the draws are fixed by the seed.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("top_p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_of_most_probable_tokens_that_holds_the_mass(top_p):
    logits = np.random.default_rng(2).normal(0, 3, (50, 900)).astype(np.float32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    threshold = np.asarray(jax.jit(nucleus_threshold)(weights, np.float32(top_p)))
    probability = weights.astype(np.float64) / weights.sum(-1, keepdims=True, dtype=np.float64)
    # Sums in float32 are good to about 1e-6 of the mass.
    assert (np.where(weights >= threshold, probability, 0).sum(-1) >= top_p - 1e-6).all()
    assert (np.where(weights > threshold, probability, 0).sum(-1) < top_p + 1e-6).all()


def test_equally_probable_tokens_are_in_the_nucleus_together():
    weights = np.array([[0.5, 1.0, 0.25, 0.5, 0.0]], np.float32)  # probabilities 2/9, 4/9, 1/9, 2/9, 0
    cases = {0.1: [1], 0.44: [1], 0.45: [0, 1, 3], 0.7: [0, 1, 3], 0.88: [0, 1, 3], 0.9: [0, 1, 2, 3]}
    for top_p, tokens in cases.items():
        kept = weights >= np.asarray(nucleus_threshold(weights, np.float32(top_p)))
        assert np.flatnonzero(kept).tolist() == tokens, top_p


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token():
    weights = np.array([[1.0, 0.5, 0.25, 0.25]], np.float32)  # probabilities 1/2, 1/4, 1/8, 1/8
    kept = weights >= np.asarray(nucleus_threshold(weights, np.float32(0.75)))
    assert kept.tolist() == [[True, True, False, False]]


def test_most_probable_tokens_are_always_in():
    uniform = np.ones((1, 7), np.float32)
    assert (uniform >= np.asarray(nucleus_threshold(uniform, np.float32(1e-6)))).all()


def test_temperature_zero_takes_the_most_probable_token():
    logits = np.random.default_rng(4).normal(size=(16, 50)).astype(np.float32)
    keys = np.stack([request_key(0, str(i)) for i in range(16)])
    tokens = sample(logits, keys, np.arange(16), np.float32(0), np.float32(0.5))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_a_token_that_cannot_occur_is_never_drawn():
    logits = np.full(10, -np.inf, np.float32)
    logits[[3, 8]] = 0.0
    keys = np.stack([request_key(0, str(i)) for i in range(500)])
    assert set(draws(logits, keys, np.zeros(500, np.int32), 1.0, 1.0).tolist()) == {3, 8}


def test_key_is_decided_by_seed_and_id():
    keys = {tuple(request_key(seed, name)) for seed in (0, 1) for name in ("a", "b", "1")}
    assert len(keys) == 6
    assert tuple(request_key(1, "a")) == tuple(request_key(1, "a"))
