"""The kernel of decode steps on TPUs, interpreted on the CPU, against writing to the cache and reading all of it;
and compiled for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_programs import needs_libtpu, run_program

from isheep_jax.config import MeshConfig
from isheep_jax.model import attention_decode_tpu
from isheep_jax.model.attention_decode_tpu import kernel_cached_attention, kernel_refusal
from isheep_jax.model.attention_reference import AttentionConfig, cached_mask, reference_attention
from isheep_jax.model.kv_cache import CacheWrite, KVCache, split_heads, write_tokens
from isheep_jax.sharding import DECODE_RULES, ActivationSharding, make_mesh, one_device_sharding

# Nothing in the cache, the last position, a block's first and its last, one within, one behind the cache, an idle row.
ENDS = [0, 511, 256, 255, 300, 512, -1, 17]


def arrays(B, S, N, K, H, dtype=jnp.float32):
    """Queries, new keys and values, and a cache of two layers."""
    shapes = (B, 1, N, H), (B, 1, K, H), (B, 1, K, H), (2, B, S, K * H), (2, B, S, K * H)
    q, k, v, *cache = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))
    return q, k, v, KVCache(*cache)


def compare(q, k, v, cache, ends, config, window, sharding, tolerance=1e-5):
    """Compares the kernel in layer 1 with `write_tokens` and the reference."""
    at = jnp.asarray(ends, jnp.int32)[:, None]
    write, layer = CacheWrite(cache, at), jnp.asarray(1)
    attended, written = jax.jit(
        lambda write: kernel_cached_attention(q, k, v, write, layer, config, window, sharding, interpret=True)
    )(write)
    expected_cache = write_tokens(write, layer, k, v, sharding)
    for ours, theirs in zip(jax.tree.leaves(written), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    keys, values = (split_heads(x[1], q.shape[3]) for x in (expected_cache.k, expected_cache.v))
    expected = reference_attention(q, keys, values, cached_mask(at, jnp.arange(cache.length), window), config)
    found, seen = attended.finalize(jnp.float32), (at[:, 0] >= 0) & (at[:, 0] < cache.length)
    np.testing.assert_allclose(found[seen], expected[seen].astype(jnp.float32), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found[~seen], 0)  # an idle row sees nothing


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 2.0)])
def test_each_row_is_read_and_written_where_it_ends(window, softcap):
    config = AttentionConfig(0.3, softcap)
    compare(*arrays(len(ENDS), 512, 6, 2, 64), ENDS, config, window, one_device_sharding())


@pytest.mark.parametrize(("N", "K", "H"), [(5, 5, 128), (4, 1, 256)])
def test_heads_that_a_device_may_have(N, K, H):
    compare(*arrays(3, 384, N, K, H), [383, 130, 5], AttentionConfig(), None, one_device_sharding())


def test_rows_without_keys_before_them_are_only_written():
    compare(*arrays(4, 128, 2, 1, 128), [-1, 0, 0, -1], AttentionConfig(), None, one_device_sharding())


def test_several_calls_take_all_rows(monkeypatch):
    monkeypatch.setattr(attention_decode_tpu, "_ROWS_BYTES", 1)
    compare(*arrays(5, 256, 2, 1, 128), [255, 3, -1, 128, 64], AttentionConfig(), 1, one_device_sharding())


def test_each_device_reads_and_writes_its_own_rows_and_heads():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    compare(*arrays(8, 512, 4, 2, 128), ENDS, AttentionConfig(), 300, ActivationSharding(mesh, DECODE_RULES))


def test_floats_of_16_bits():
    config = AttentionConfig()
    compare(*arrays(3, 256, 8, 1, 128, jnp.bfloat16), [255, 100, 16], config, None, one_device_sharding(), 2e-2)


def test_refusal_names_reason():
    def refusal(cache):
        return kernel_refusal(cache, one_device_sharding())

    flat, narrow = (jnp.zeros((1, 1, 128, width)) for width in (128, 64))
    scale = jnp.zeros((1, 1, 128, 1))
    assert refusal(KVCache(flat, flat)) is None
    assert "not 64" in refusal(KVCache(narrow, narrow))
    assert "integers" in refusal(KVCache(flat.astype(jnp.int8), flat.astype(jnp.int8), scale, scale))
    assert "tiles" in refusal(KVCache(jnp.zeros((1, 1, 1, 1, 128, 128)), jnp.zeros((1, 1, 1, 1, 128, 128))))


COMPILE = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from isheep_jax.model.attention_cached import DECODE_KERNEL
    from isheep_jax.model.attention_decode_tpu import kernel_cached_attention
    from isheep_jax.model.attention_reference import AttentionConfig
    from isheep_jax.model.kv_cache import CacheWrite, KVCache
    from isheep_jax.planning.hardware import prepare_environment, slice_devices
    from isheep_jax.sharding import AXES, DECODE_RULES, ActivationSharding

    topology, (B, N, K, H) = "{topology}", {sizes}
    prepare_environment(topology)
    mesh = Mesh(np.array(slice_devices(topology, 1)[:4]).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)

    def array(*shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    cache = KVCache(*(array(2, 2 * B, 2048, 2 * K * H, spec=(None, "data", None, "tensor")) for _ in range(2)))
    q, k = (array(2 * B, 1, 2 * n, H, spec=("data", None, "tensor")) for n in (N, K))
    at = array(2 * B, 1, spec=("data",), dtype=jnp.int32)

    def steps(cache, q, k, v, at):
        def step(carry, layer):
            cache, x = carry
            settings = layer, AttentionConfig(softcap=30.0), jnp.where(layer == 0, 500, 2048)
            attended, cache = kernel_cached_attention(
                q + x, k, v, CacheWrite(cache, at), *settings, ActivationSharding(mesh, DECODE_RULES)
            )
            return (cache, attended.finalize(q.dtype)), None

        return jax.lax.scan(step, (cache, q), jnp.arange(2))[0]

    compiled = jax.jit(steps, donate_argnums=0).lower(cache, q, k, k, at).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert DECODE_KERNEL in text and " scatter(" not in text
    # The cache is written in place.
    assert memory.alias_size_in_bytes >= 2 * 2 * B * 2048 * K * H * 2, memory
    assert memory.temp_size_in_bytes < 2**24, memory
    print("compiled")
"""


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v4-8", (144, 8, 1, 128)),
        ("v5e-4", (64, 32, 8, 128)),
        ("v5e-4", (7, 20, 20, 128)),
        ("v5p-8", (384, 8, 1, 128)),
        ("v6e-4", (32, 14, 2, 64)),
        ("v6e-4", (1, 4, 1, 256)),
    ],
)
def test_kernel_compiles_for_tpu_and_writes_in_place(topology, sizes):
    assert run_program(COMPILE.format(topology=topology, sizes=sizes)) == ["compiled"]
