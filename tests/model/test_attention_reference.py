import jax
import jax.numpy as jnp
import numpy as np

from isheep_jax.model.attention_reference import AttentionConfig, cached_mask, packed_mask, reference_attention


def by_loops(q, k, v, mask):
    """Attention as its definition reads, one query at a time, in float64."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q, k, v, mask))
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def test_grouped_queries_equal_definition():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, size, heads, 8))
        for i, (size, heads) in enumerate([(3, 6), (5, 2), (5, 2)])
    )
    mask = jnp.asarray([[[1, 0, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]] * 2, bool)
    np.testing.assert_allclose(
        reference_attention(q, k, v, mask, AttentionConfig()), by_loops(q, k, v, mask), rtol=1e-5, atol=1e-6
    )


def test_grouped_queries_equal_keys_and_values_repeated_for_each_head():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, size, heads, 8))
        for i, (size, heads) in enumerate([(3, 6), (5, 2), (5, 2)])
    )
    mask = cached_mask(jnp.asarray([[0, 2, 4], [1, 3, 4]]), jnp.arange(5))
    repeated = reference_attention(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), mask, AttentionConfig())
    np.testing.assert_allclose(reference_attention(q, k, v, mask, AttentionConfig()), repeated, rtol=1e-6, atol=1e-6)


def test_query_that_may_see_nothing_gives_numbers():
    q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 3, 2, 4))
    assert np.isfinite(reference_attention(q, k, k, jnp.zeros((1, 1, 3), bool), AttentionConfig())).all()


def test_packed_mask_is_causal_within_segments():
    segments = jnp.asarray([[1, 1, 2, 2, 0]])
    mask = packed_mask(5, segments)[0]
    expected = [[s == t and i <= j for i, s in enumerate(segments[0])] for j, t in enumerate(segments[0])]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(packed_mask(5, None)[0], np.tri(5, dtype=bool))


def test_cached_mask_ends_at_querys_position():
    np.testing.assert_array_equal(
        cached_mask(jnp.asarray([[2, -1]]), jnp.arange(4))[0], [[True, True, True, False], [False] * 4]
    )
