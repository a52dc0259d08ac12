"""What GPUs use in the place of the reference: the choice between cuDNN and chunks, and both against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import small
from gpu_stand_in import stand_in, without_cudnn
from jaxprs import equations
from tiles import in_tiles

from isheep_jax.model import attention_gpu
from isheep_jax.model.architecture import FAMILIES
from isheep_jax.model.attention import packed_attention
from isheep_jax.model.attention_decode_gpu import kernel_cached_attention
from isheep_jax.model.attention_gpu import AttentionShape, cudnn_refusal, kernel_refusal
from isheep_jax.model.attention_reference import AttentionConfig, cached_mask, packed_mask, reference_attention
from isheep_jax.model.kv_cache import KVCache, PrefixKV
from isheep_jax.model.transformer import attention_config
from isheep_jax.sharding import one_device_sharding

H100, A100 = (9, 0), (8, 0)
B, N, K, H = 2, 6, 2, 8


def shape(**changes):
    """Causal attention of Llama 3 8B in training, with changes."""
    settings = {"dtype": jnp.dtype("bfloat16"), "queries": 1024, "keys": 1024, "heads": 32, "head_dim": 128}
    return AttentionShape(**settings | {"softcap": None, "masked": False, "differentiable": True} | changes)


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, H100, None),
        ({}, A100, None),
        ({}, (7, 5), "compute capability 8.0"),
        ({}, None, "NVIDIA"),
        ({"dtype": jnp.dtype("float16")}, H100, None),
        ({"dtype": jnp.dtype("float32")}, H100, "not in float32"),
        ({"softcap": 50.0}, H100, "softcap"),
        ({"head_dim": 256}, H100, "at most 128 dimensions, not 256"),
        ({"head_dim": 256, "differentiable": False}, H100, None),
        ({"head_dim": 256, "differentiable": False}, A100, "at most 128"),
        ({"head_dim": 100}, H100, "multiple of 8"),
        ({"queries": 1023, "keys": 1023}, H100, None),
        ({"queries": 1023, "keys": 1023, "masked": True}, H100, "even lengths"),
        ({"queries": 1023, "keys": 1023, "masked": True, "differentiable": False}, H100, None),
        ({"queries": 512, "keys": 4096, "masked": True}, H100, None),
        ({"queries": 512, "keys": 4098, "masked": True}, H100, "larger than the queries"),
        ({"queries": 8192, "keys": 8192}, H100, None),
    ],
)
def test_refusal_names_reason(changes, capability, reason):
    found = cudnn_refusal(shape(**changes), capability)
    assert found is None if reason is None else reason in found


def test_families_that_cudnn_cannot_train_are_those_of_gemma():
    heads = {name: family.head_dim or 128 for name, family in FAMILIES.items()}
    configs = {
        name: attention_config(small(family=name, head_dim=heads[name], attention_softcap=family.attention_softcap))
        for name, family in FAMILIES.items()
    }
    refused = {
        name: cudnn_refusal(shape(head_dim=heads[name], softcap=config.softcap), H100)
        for name, config in configs.items()
    }
    assert {name for name, reason in refused.items() if reason} == {"gemma2", "gemma3_text"}
    assert "softcap" in refused["gemma2"]
    assert "256" in refused["gemma3_text"]


def prefix(shared, length=30):
    """A prefix of 30 keys of which some are padding, seen by all tokens."""
    rows = 1 if shared else B
    k, v = (jax.random.normal(jax.random.key(seed), (rows, length, K * H)) for seed in (5, 6))
    return PrefixKV(KVCache(k, v), (jnp.arange(length) < 25)[None, None], jnp.arange(length)[None])


def inputs(T, *lengths):
    """Queries, keys and values [B, T, ...], and segment ids and positions of segments of these lengths."""
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, H)) for i, n in enumerate((N, K, K)))
    segments, positions, start = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32), 0
    for number, length in enumerate(lengths, start=1):
        segments[:, start : start + length] = number
        positions[:, start : start + length] = np.arange(length)
        start += length
    return q, k, v, jnp.asarray(segments), jnp.asarray(positions)


def attend(q, k, v, config, kind, segments, positions, prefix_kv=(), differentiable=True):
    return packed_attention(
        q,
        k,
        v,
        config,
        kind,
        positions=positions,
        segment_ids=segments,
        prefix_kv=prefix_kv,
        differentiable=differentiable,
        sharding=one_device_sharding(),
    )


CASES = {
    "rows of one segment": {"lengths": (70,)},
    "a window": {"lengths": (70,), "windows": (20,)},
    "a window longer than the row": {"lengths": (70,), "windows": (500,)},
    "packed": {"lengths": (20, 30, 14), "packed": True},
    "packed, layers with and without a window": {"lengths": (20, 30, 14), "packed": True, "windows": (None, 9)},
    "after a shared prefix": {"lengths": (30, 34), "packed": True, "prefixes": (True,)},
    "after two prefixes, with a window": {"lengths": (70,), "prefixes": (True, False), "windows": (40,)},
}


@pytest.mark.parametrize("way", ["cudnn", "chunks"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_reference(monkeypatch, case, way):
    case, T = CASES[case], 70
    lengths, windows = case["lengths"], case.get("windows", (None,))
    q, k, v, segments, positions = inputs(T, *lengths)
    segments = segments if case.get("packed") else None
    prefixes = tuple(prefix(shared) for shared in case.get("prefixes", ()))
    positions = positions + 25 if prefixes else positions
    kind = jnp.asarray(len(windows) - 1)
    config = AttentionConfig(0.3, None, windows)

    def gradients(run):
        out, pull = jax.vjp(run, q, k, v)
        real = jnp.arange(T) < sum(lengths)  # what padding sees is nobody's business
        return out[:, : sum(lengths)], *pull(jnp.where(real[None, :, None, None], jnp.cos(out), 0.0))

    def reference(q, k, v):
        mask = [packed_mask(T, segments, windows[-1])]
        for one in prefixes:
            near = positions[:, :, None] - one.positions[:, None, :] < (windows[-1] or 10_000)
            mask.insert(0, one.mask & near)
            k, v = (
                jnp.concatenate([jnp.broadcast_to(x.reshape(len(x), -1, K, H), (B, 30, K, H)), own], axis=1)
                for x, own in ((one.cache.k, k), (one.cache.v, v))
            )
        mask = jnp.concatenate([jnp.broadcast_to(m, (B, T, m.shape[2])) for m in mask], axis=2)
        return reference_attention(q, k, v, mask, config)

    stand_in(monkeypatch, H100 if way == "cudnn" else None)
    monkeypatch.setattr(attention_gpu, "CHUNK", 32)
    if way == "cudnn":
        without_cudnn(monkeypatch)
        monkeypatch.setattr(attention_gpu, "cudnn_refusal", lambda shape, capability: None)
    found = gradients(lambda q, k, v: attend(q, k, v, config, kind, segments, positions, prefixes))
    for a, b in zip(found, gradients(reference)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_bound_logits(monkeypatch):
    stand_in(monkeypatch, None)
    q, k, v, segments, positions = inputs(70, 70)
    config = AttentionConfig(0.3, 2.0)
    monkeypatch.setattr(attention_gpu, "CHUNK", 32)
    found = attend(q, k, v, config, 0, None, positions)
    expected = reference_attention(q, k, v, packed_mask(70, None), config)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def loss(q):
        return jnp.sum(attend(q, k, v, config, 0, segments, positions) ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(q)
    sizes = {value.aval.shape for equation in equations(program) for value in equation.outvars}
    assert (B, K, N // K, 32, 70) in sizes
    assert not {size for size in sizes if len(size) > 3 and min(size[-2:]) >= 70}


@pytest.mark.parametrize(
    ("head_dim", "tile", "is_int8", "capability", "reason"),
    [
        (128, 512, False, H100, None),
        (64, 128, False, A100, None),
        (128, 512, False, (7, 5), "compute capability"),
        (128, 512, False, None, "NVIDIA"),
        (128, 512, True, H100, "integers"),
        (80, 512, False, H100, "not 80"),
        (8, 512, False, H100, "not 8"),
        (128, 0, False, H100, "not 0"),
        (128, 32, False, H100, "not 32"),
    ],
)
def test_refusal_of_decode_kernel_names_reason(head_dim, tile, is_int8, capability, reason):
    found = kernel_refusal(head_dim, tile, is_int8, capability)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, 2.0)])
def test_decode_kernel_reads_each_row_of_its_layer_as_far_as_it_goes(window, softcap):
    rows, S, heads, dim = 4, 256, 3, 16
    at = jnp.asarray([[0], [255], [130], [-1]])
    shapes = [(rows, 1, heads, dim), *[(rows, S, 1, dim)] * 2]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    cache = in_tiles(KVCache(*(jnp.stack([-x, x]).reshape(2, rows, S, dim) for x in (k, v))), 128, dim)
    config = AttentionConfig(0.3, softcap)
    found = kernel_cached_attention(q, cache, jnp.asarray(1), config, window, at, one_device_sharding(), interpret=True)
    expected = reference_attention(q, k, v, cached_mask(at, jnp.arange(S), window), config)
    found = found.finalize(q.dtype)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[3], 0)  # an idle row sees nothing
