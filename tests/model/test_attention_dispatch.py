"""What each platform uses in the place of the reference, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiles import in_tiles

from isheep_jax.model.attention import cached_attention, packed_attention
from isheep_jax.model.attention_blockwise import PACKED_BLOCK
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.model.attention_reference import (
    AttentionConfig,
    Partial,
    cached_mask,
    packed_mask,
    reference_attention,
)
from isheep_jax.model.kv_cache import KVCache, PrefixKV
from isheep_jax.sharding import one_device_sharding

N, K, H = 6, 2, 8


def arrays(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def packed(B, T, *lengths):
    """Segment ids [B, T] of segments that begin at multiples of PACKED_BLOCK, and positions within them."""
    segments, positions, start = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32), 0
    for number, length in enumerate(lengths, start=1):
        segments[:, start : start + length] = number
        positions[:, start : start + length] = np.arange(length)
        start += -(-length // PACKED_BLOCK) * PACKED_BLOCK
    return jnp.asarray(segments), jnp.asarray(positions)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("T", "lengths"), [(340, (70, 130, 1, 33)), (31, (31,)), (128, ()), (512, (512,))])
def test_blocks_of_packed_rows_equal_reference(T, lengths, kind, softcap):
    q, k, v = arrays((2, T, N, H), (2, T, K, H), (2, T, K, H))
    segments, positions = packed(2, T, *lengths)
    windows = (None, 20)
    config = AttentionConfig(0.3, softcap, windows)
    found = jax.jit(
        lambda kind: packed_attention(
            q,
            k,
            v,
            config,
            kind,
            positions=positions,
            segment_ids=segments,
            prefix_kv=(),
            differentiable=False,
            sharding=one_device_sharding(),
        )
    )(kind)
    expected = reference_attention(q, k, v, packed_mask(T, segments, windows[kind]), AttentionConfig(0.3, softcap))
    tokens = np.asarray(segments) > 0 if lengths else slice(None)  # what padding sees is nobody's business
    np.testing.assert_allclose(found[tokens], expected[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_prefix_is_seen_besides_row(shared, kind):
    B, T, S = 2, 64, 50
    rows = 1 if shared else B
    q, k, v, before_k, before_v = arrays((B, T, N, H), (B, T, K, H), (B, T, K, H), (rows, S, K, H), (rows, S, K, H))
    segments, positions = packed(B, T, 40)
    length, windows = 45, (None, 60)
    held = jnp.arange(S)[None, None] < length
    cache = KVCache(*(x.reshape(rows, S, K * H) for x in (before_k, before_v)))
    prefix = PrefixKV(cache, held, jnp.arange(S)[None])
    found = packed_attention(
        q,
        k,
        v,
        AttentionConfig(0.3, None, windows),
        jnp.asarray(kind),
        positions=positions + length,
        segment_ids=segments,
        prefix_kv=(prefix,),
        differentiable=False,
        sharding=one_device_sharding(),
    )
    # The same keys in one row: those of the prefix, then the row's own.
    whole_k, whole_v = (
        jnp.concatenate([jnp.broadcast_to(a, (B, S, K, H)), b], axis=1) for a, b in ((before_k, k), (before_v, v))
    )
    mask = jnp.concatenate([jnp.broadcast_to(held, (B, T, S)), packed_mask(T, segments)], axis=2)
    places = jnp.concatenate([jnp.broadcast_to(jnp.arange(S), (B, S)), positions + length], axis=1)
    near = (positions + length)[:, :, None] - places[:, None, :] < (windows[kind] or 10_000)
    expected = reference_attention(q, whole_k, whole_v, mask & near, AttentionConfig(0.3))
    np.testing.assert_allclose(found[:, :40], expected[:, :40], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("kind", [0, 1])
def test_cache_is_read_as_far_as_each_row_goes(kind, tile):
    B, S, windows = 4, 384, (None, 30)
    at = jnp.asarray([[0], [383], [127], [-1]])
    q, k, v = arrays((B, 1, N, H), (B, S, K, H), (B, S, K, H))
    cache = in_tiles(KVCache(*(jnp.stack([x, -x]).reshape(2, B, S, K * H) for x in (k, v))), tile, H)
    found = cached_attention(
        q,
        cache,
        jnp.asarray(0),
        AttentionConfig(0.3, None, windows),
        jnp.asarray(kind),
        positions=at,
        cache_positions=at,
        key_limit=0,
        prefix_kv=(),
        sharding=one_device_sharding(),
    )
    expected = reference_attention(q, k, v, cached_mask(at, jnp.arange(S), windows[kind]), AttentionConfig(0.3))
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[3], 0)  # an idle row sees nothing


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("rows", [16, 24, 12])
def test_rows_that_are_read_in_order_of_their_lengths_keep_their_places(rows, tile):
    at = jax.random.permutation(jax.random.key(7), jnp.linspace(0, 383, rows).astype(jnp.int32))[:, None]
    q, k, v = arrays((rows, 1, N, H), (rows, 384, K, H), (rows, 384, K, H))
    cache = in_tiles(KVCache(*(x.reshape(1, rows, 384, K * H) for x in (k, v))), tile, H)
    found = cached_attention(
        q,
        cache,
        jnp.asarray(0),
        AttentionConfig(0.3, None, (None,)),
        jnp.asarray(0),
        positions=at,
        cache_positions=at,
        key_limit=0,
        prefix_kv=(),
        sharding=one_device_sharding(),
    )
    expected = reference_attention(q, k, v, cached_mask(at, jnp.arange(384)), AttentionConfig(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 128])
def test_blocks_behind_end_of_row_change_no_bit(tile):
    B, S = 2, 512
    q, k, v = arrays((B, 1, N, H), (B, S, K, H), (B, S, K, H))
    cache = in_tiles(KVCache(*(x.reshape(1, B, S, K * H) for x in (k, v))), tile, H)
    run = jax.jit(
        lambda at: cached_attention(
            q,
            cache,
            jnp.asarray(0),
            AttentionConfig(0.3, None, (None,)),
            jnp.asarray(0),
            positions=at,
            cache_positions=at,
            key_limit=0,
            prefix_kv=(),
            sharding=one_device_sharding(),
        )
    )
    assert cache_block("cpu") < 256
    np.testing.assert_array_equal(run(jnp.asarray([[100], [100]]))[0], run(jnp.asarray([[100], [511]]))[0])


def test_attention_in_parts_equals_whole():
    q, k, v = arrays((2, 5, N, H), (2, 12, K, H), (2, 12, K, H))
    mask = jax.random.bernoulli(jax.random.key(9), 0.5, (2, 5, 12)).at[:, :, 0].set(True)
    config = AttentionConfig(0.5, 3.0)
    whole = reference_attention(q, k, v, mask, config)
    none = Partial.init(q, K)
    first = none.update(q, k[:, :4], v[:, :4], mask[:, :, :4], config)
    both = first.update(q, k[:, 4:], v[:, 4:], mask[:, :, 4:], config)
    merged = none.update(q, k[:, 4:], v[:, 4:], mask[:, :, 4:], config).merge(first)
    for partial in (both, merged, merged.merge(none)):
        np.testing.assert_allclose(partial.finalize(q.dtype), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(none.finalize(q.dtype), 0)
