import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from minute_model import ARCHITECTURE
from tiles import flat, in_tiles

from isheep_jax.decode.cache import ROW_TOKENS, Sizing, allocate_cache, bucket_of, cache_length, cache_sharding
from isheep_jax.decode.device_slots import copy_rows
from isheep_jax.decode.packing import empty_rows, fill, pack
from isheep_jax.decode.prefill import make_prefix, prefill
from isheep_jax.model.kv_cache import CacheWrite, KVCache, init_cache
from isheep_jax.model.transformer import ForwardSetup, forward

SIZING = Sizing("cpu", 1)


def test_buckets_are_few_and_waste_little():
    assert [bucket_of(n, 32) for n in (1, 32, 33, 64, 65, 200, 257, 400, 513)] == [
        32,
        32,
        64,
        64,
        128,
        256,
        320,
        448,
        640,
    ]
    assert [bucket_of(n, 128) for n in (1, 129, 257, 600)] == [128, 256, 320, 640]
    assert all(n <= bucket_of(n, 32) <= 1.25 * n for n in range(256, 4000))


def test_cache_holds_sequence_in_whole_blocks():
    cache = allocate_cache(ARCHITECTURE, 3, 130, jnp.dtype("bfloat16"), mesh_of())
    assert cache_length(130) == cache.length == 256
    assert cache.k.shape == (2, 3, 2, 2, 8, 128)  # two tiles of 128 positions, in which the keys of a head are together
    assert cache.v.shape == (2, 3, 2, 2, 128, 8)


def test_rows_hold_every_prompt_once_and_apart():
    lengths = sorted(np.random.default_rng(0).integers(1, 700, 500).tolist(), reverse=True)
    seen = []
    for row in pack(lengths, SIZING):
        assert row.length <= max(ROW_TOKENS, SIZING.row_length(lengths[row.prompts[0]]))
        end = 0
        for index, begin in zip(row.prompts, row.begins):
            assert begin % 32 == 0
            assert begin >= end
            end = begin + lengths[index]
        assert end <= row.length
        seen += row.prompts
    assert sorted(seen) == list(range(500))


def test_packing_wastes_little_beyond_alignment():
    lengths = sorted(np.random.default_rng(1).integers(20, 200, 2000).tolist(), reverse=True)
    rows = list(pack(lengths, SIZING))
    aligned = sum(-(-n // 32) * 32 for n in lengths)
    assert len(rows) * ROW_TOKENS < 1.05 * aligned


def test_prompts_on_tpus_begin_at_multiples_of_what_they_take_up_to_the_lanes():
    lengths = np.random.default_rng(2).integers(1, 700, 500).tolist()
    sizing = Sizing("tpu", 16)
    for row in pack(lengths, sizing):
        for index, begin in zip(row.prompts, row.begins):
            assert begin % min(sizing.aligned(lengths[index]), 128) == 0
            assert sizing.aligned(lengths[index]) in (32, 64, -(-lengths[index] // 128) * 128)


STATIC = {"architecture": ARCHITECTURE, "compute_dtype": jnp.dtype("float32")}


def keys_of(params, tokens) -> np.ndarray:
    """Keys [L, T, K * H] of a prompt by the plain forward."""
    row = jnp.asarray(tokens)[None]
    positions = jnp.arange(len(tokens))[None]
    _, cache = forward(params, ARCHITECTURE, row, positions, ForwardSetup(jnp.float32), collect_kv=True)
    return np.asarray(cache.k[:, 0])


def prompts(*lengths) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(2, 60, n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("shards", [1, 2])
def test_prefill_writes_each_prompt_to_its_slot_and_nothing_else(params, shards):
    mesh = mesh_of() if shards == 1 else mesh_of((2, 1, 2))
    cache = allocate_cache(ARCHITECTURE, 8, 128, jnp.dtype("float32"), mesh)
    tokens = prompts(5, 40, 17)
    packed = empty_rows(shards, 128)
    # The slots of a row are those of its data shard.
    places = [(0, 0, 1, 3), (0, 32, 2, 0), (shards - 1, 96, 3, 7)]
    for (row, begin, segment, slot), prompt in zip(places, tokens):
        fill(packed[row], begin, segment, prompt, slot)
    cache = prefill(params, cache, packed, None, mesh=mesh, **STATIC)
    expected = np.zeros((2, 8, 128, 16), np.float32)
    for (_, _, _, slot), prompt in zip(places, tokens):
        expected[:, slot, : len(prompt)] = keys_of(params, prompt)
    np.testing.assert_allclose(flat(cache)[0], expected, atol=1e-4)


def test_sequence_overwrites_padding_that_was_written_after_its_prompt(params):
    (sequence,) = prompts(40)
    packed = empty_rows(1, 64)
    fill(packed[0], 32, 1, sequence[:5], 0)
    # A flat cache, as on TPUs, takes the prompt and the padding up to a multiple of 32.
    cache = init_cache(ARCHITECTURE, 1, 128, jnp.dtype("float32"))
    cache = prefill(params, cache, packed, None, mesh=mesh_of(), **STATIC)
    assert np.any(cache.k[:, 0, 5:32])

    @jax.jit
    def decode(cache, token, position):
        write = CacheWrite(cache, position)
        return forward(params, ARCHITECTURE, token, position, ForwardSetup(jnp.float32), cache=write)

    for position in range(5, len(sequence)):
        hidden, cache = decode(cache, sequence[None, [position]], jnp.asarray([[position]]))
    np.testing.assert_allclose(cache.k[:, 0, : len(sequence)], keys_of(params, sequence), atol=1e-4)
    assert np.all(np.isfinite(hidden))


def test_prompts_keys_are_same_to_bit_wherever_it_is_packed(params):
    prompt, long, short = prompts(45, 300, 20)

    def keys(length, *places):
        packed = empty_rows(1, length)
        for segment, (begin, tokens, slot) in enumerate(places, start=1):
            fill(packed[0], begin, segment, tokens, slot)
        cache = allocate_cache(ARCHITECTURE, 2, 384, jnp.dtype("float32"), mesh_of())
        return np.asarray(flat(prefill(params, cache, packed, None, mesh=mesh_of(), **STATIC))[0][:, 0, :45])

    alone = keys(256, (0, prompt, 0))
    np.testing.assert_array_equal(keys(512, (0, long, 1), (320, prompt, 0), (384, short, -1)), alone)
    np.testing.assert_array_equal(keys(512, (0, short, -1), (32, prompt, 0)), alone)


def test_prompt_after_prefix_has_keys_of_whole(params):
    prefix, suffix = prompts(70, 30)
    padded = np.zeros(96, np.int32)
    padded[:70] = prefix
    shared = make_prefix(params, padded, np.int32(70), mesh=mesh_of(), **STATIC)
    packed = empty_rows(1, 64)
    fill(packed[0], 32, 1, suffix, 0)
    cache = allocate_cache(ARCHITECTURE, 1, 128, jnp.dtype("float32"), mesh_of())
    keys = flat(prefill(params, cache, packed, shared, mesh=mesh_of(), **STATIC))[0][:, 0, :30]
    np.testing.assert_allclose(keys, keys_of(params, np.concatenate([prefix, suffix]))[:, 70:], atol=1e-4)


@pytest.mark.parametrize("tile", [0, 32, 64])
@pytest.mark.parametrize("shards", [1, 2])
def test_cache_rows_are_copied_within_their_shard(shards, tile):
    mesh = mesh_of((shards, 1, 1))
    content = np.random.default_rng(0).normal(size=(2, 8, 128, 16)).astype(np.float32)
    pairs = [(1, 2), (1, 3), (-1, -1), (-1, -1), (7, 4), (5, 6), (-1, -1), (-1, -1)]
    expected = content.copy()
    for source, target in pairs:
        if target >= 0:
            expected[:, target, :64] = content[:, source, :64]
    cache = in_tiles(KVCache(jnp.asarray(content), -jnp.asarray(content)), tile, 8)
    cache = jax.device_put(cache, cache_sharding(mesh))
    copied = copy_rows(cache, np.asarray(pairs, np.int32), length=64, mesh=mesh)
    keys, values = flat(copied)
    np.testing.assert_array_equal(keys, expected)
    np.testing.assert_array_equal(values, -expected)
    assert jax.tree.leaves(cache)[0].is_deleted()
