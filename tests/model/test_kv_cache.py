import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import small
from tiles import flat

from isheep_jax.model.kv_cache import CacheWrite, init_cache, write_tokens
from isheep_jax.model.quantization import quantize
from isheep_jax.sharding import one_device_sharding

ARCHITECTURE = small(heads=6, hidden_size=24)
K, V = (scale * jax.random.normal(jax.random.key(seed), (3, 2, 2, 8)) for seed, scale in ((0, 1), (1, 100)))
# Two tokens for each of three rows; -1 and 16 lie outside the cache.
POSITIONS = jnp.asarray([[4, 5], [0, -1], [15, 16]])
WRITTEN = ((0, 4, 0), (0, 5, 1), (1, 0, 0), (2, 15, 0))  # (row, cache position, token)


@pytest.mark.parametrize("tile", [0, 8])
def test_new_keys_are_written_at_their_positions_and_nowhere_else(tile):
    cache = init_cache(ARCHITECTURE, 3, 16, jnp.dtype(jnp.float32), tile=tile)
    written = write_tokens(CacheWrite(cache, POSITIONS), jnp.asarray(1), K, V, one_device_sharding())
    for values, x in zip(flat(written), (K, V)):
        for row, position, token in WRITTEN:
            np.testing.assert_array_equal(values[1, row, position], x[row, token].reshape(-1))
        assert np.count_nonzero(np.any(values[1], axis=-1)) == len(WRITTEN)
        assert not np.any(values[0])
    assert written.k_scale is None


@pytest.mark.parametrize("tile", [0, 8])
def test_new_keys_are_rounded_by_token_and_head_and_nothing_else_is_touched(tile):
    cache = init_cache(ARCHITECTURE, 3, 16, jnp.dtype(jnp.int8), tile=tile)
    written = write_tokens(CacheWrite(cache, POSITIONS), jnp.asarray(1), K, V, one_device_sharding())
    for values, scale, x in zip(flat(written), (written.k_scale, written.v_scale), (K, V)):
        expected = quantize(x, (3,))
        for row, position, token in WRITTEN:
            np.testing.assert_array_equal(values[1, row, position], expected.values[row, token].reshape(-1))
            np.testing.assert_array_equal(scale[1, row, position], expected.scale[row, token])
        assert np.count_nonzero(scale) == len(WRITTEN) * 2
        assert not np.any(values[0])


def test_tokens_of_packed_rows_are_written_to_rows_that_are_named():
    cache = init_cache(ARCHITECTURE, 4, 16, jnp.dtype(jnp.float32))
    rows = jnp.asarray([[3, 3], [0, 0], [1, 2]])
    positions = jnp.asarray([[0, 1], [7, -1], [2, 2]])
    written = write_tokens(CacheWrite(cache, positions, rows), jnp.asarray(0), K, V, one_device_sharding())
    expected = {(3, 0): K[0, 0], (3, 1): K[0, 1], (0, 7): K[1, 0], (1, 2): K[2, 0], (2, 2): K[2, 1]}
    for (row, position), key in expected.items():
        np.testing.assert_array_equal(written.k[0, row, position], key.reshape(-1))
    assert np.count_nonzero(np.any(written.k, axis=-1)) == len(expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_groups_of_tokens_are_written_as_their_tokens_are(dtype):
    # A row with a sequence of six tokens and one of three, each padded to a multiple of four, and a group of padding.
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, -1, -1, 4, 5, 6, -1, -1, -1, -1, -1]])
    rows = jnp.asarray([[2] * 6 + [-1] * 2 + [0] * 3 + [-1] * 5])
    k, v = (jax.random.normal(jax.random.key(seed), (1, 16, 2, 8)) for seed in (2, 3))
    cache = init_cache(ARCHITECTURE, 3, 16, jnp.dtype(dtype))
    write = CacheWrite(cache, positions, rows)
    one, four = (write_tokens(w, jnp.asarray(1), k, v, one_device_sharding()) for w in (write, write.replace(group=4)))
    for by_token, by_group in zip(jax.tree.leaves(one), jax.tree.leaves(four)):
        written = np.zeros(by_token.shape, bool)
        written[1, 2, :6] = written[1, 0, 4:7] = True
        np.testing.assert_array_equal(np.where(written, by_group, 0), by_token)
        # Padding goes to the positions after a sequence and nowhere else.
        touched = np.zeros(by_token.shape, bool)
        touched[1, 2, :8] = touched[1, 0, 4:8] = True
        assert not np.any(np.where(touched, 0, by_group))
