import jax.numpy as jnp
import numpy as np
import pytest
from minute_model import ARCHITECTURE

from isheep_jax.decode.cache import allocate, bucket_of, cache_bytes, length_buckets, prefill_rows, write_rows
from isheep_jax.model.transformer import KVCache


def test_buckets_are_few_and_end_with_the_context():
    assert length_buckets(128) == (32, 64, 128)
    assert length_buckets(100) == (32, 64, 100)
    assert length_buckets(20) == (20,)
    assert [bucket_of(n, 100) for n in (1, 32, 33, 64, 65, 100)] == [32, 32, 64, 64, 100, 100]


@pytest.mark.parametrize(("bucket", "rows"), [(32, 8), (1024, 8), (2048, 4), (32768, 1)])
def test_long_prompts_are_prefilled_in_fewer_rows(bucket, rows):
    assert prefill_rows(bucket, None) == rows


def test_bytes_are_those_of_the_allocated_cache():
    cache = allocate(ARCHITECTURE, 3, 16, jnp.dtype("bfloat16"), None)
    assert cache.k.shape == (2, 3, 16, 2, 8)
    assert cache_bytes(ARCHITECTURE, 3, 16, jnp.bfloat16) == cache.k.nbytes + cache.v.nbytes


def test_rows_are_written_to_their_slots_and_nowhere_else():
    cache = allocate(ARCHITECTURE, 4, 16, jnp.dtype("float32"), None)
    fresh = np.random.default_rng(0).normal(size=(2, 3, 8, 2, 8)).astype(np.float32)
    fresh[:, 2] = fresh[:, 0]  # a row that is repeated to fill the shape
    written = write_rows(cache, KVCache(k=jnp.asarray(fresh), v=-jnp.asarray(fresh)), jnp.array([2, 0, 2]))
    expected = np.zeros((2, 4, 16, 2, 8), np.float32)
    expected[:, 2, :8], expected[:, 0, :8] = fresh[:, 0], fresh[:, 1]
    np.testing.assert_array_equal(written.k, expected)
    np.testing.assert_array_equal(written.v, -expected)
