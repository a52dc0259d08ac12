import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minute_model import ARCHITECTURE

from isheep_jax.config import MeshConfig
from isheep_jax.decode.cache import allocate, bucket_of, cache_bytes, length_buckets, prefill_rows, write_rows
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.sharding import decode_mesh, make_mesh


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
    assert cache.k.shape == (2, 3, 16, 16)
    assert cache_bytes(ARCHITECTURE, 3, 16, jnp.bfloat16) == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_are_written_to_their_slots_and_nowhere_else(shards):
    mesh = None if shards == 1 else decode_mesh(make_mesh(MeshConfig(), jax.devices()[:4]), 2)
    cache = allocate(ARCHITECTURE, 8, 16, jnp.dtype("float32"), mesh)
    fresh = np.random.default_rng(0).normal(size=(2, 4, 12, 16)).astype(np.float32)
    # Rows and slots of the second half are those of the second data shard; slot -1 only fills up the shape.
    rows, slots = KVCache(k=jnp.asarray(fresh), v=-jnp.asarray(fresh)), jnp.array([3, 0, -1, 6])
    written = jax.jit(write_rows, static_argnums=3)(cache, rows, slots, mesh)
    expected = np.zeros((2, 8, 16, 16), np.float32)
    for row, slot in enumerate((3, 0, None, 6)):
        if slot is not None:
            expected[:, slot, :12] = fresh[:, row]
    np.testing.assert_array_equal(written.k, expected)
    np.testing.assert_array_equal(written.v, -expected)
