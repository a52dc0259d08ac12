"""Splash attention against the XLA reference, with the kernels interpreted on the CPU, and compiled for a TPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_programs import needs_libtpu, run_program

from isheep_jax.config import MeshConfig
from isheep_jax.model.attention_reference import AttentionConfig, packed_mask, reference_attention
from isheep_jax.model.attention_splash import splash_attention
from isheep_jax.sharding import TRAIN_RULES, ActivationSharding, make_mesh

ONE = make_mesh(MeshConfig(), jax.devices()[:1])


def inputs(B, T, N, K, H, dtype=jnp.float32):
    """Queries, keys, values, and a gradient of the output."""
    sizes = enumerate((N, K, K, N))
    return [jax.random.normal(jax.random.key(i), (B, T, heads, H), dtype) for i, heads in sizes]


def segments(*rows):
    """Segment ids [B, T] from (id, tokens) pairs."""
    return jnp.asarray([[number for number, tokens in row for _ in range(tokens)] for row in rows], jnp.int32)


def both(q, k, v, gradient, *, segment_ids=None, window=None, scale=None, softcap=None, mesh=ONE):
    """(output, gradients of q, k and v) of the kernels and of the reference."""
    mask, config = packed_mask(q.shape[1], segment_ids, window), AttentionConfig(scale, softcap)

    def kernels(q, k, v):
        settings = {"config": config, "segment_ids": segment_ids, "window": window}
        return splash_attention(q, k, v, **settings, sharding=ActivationSharding(mesh), interpret=True)

    def reference(q, k, v):
        return reference_attention(q, k, v, mask, config)

    def with_gradients(function):
        def run(*qkv):
            out, pull = jax.vjp(function, *qkv)
            return out, *pull(gradient)

        return jax.jit(run)(q, k, v)

    return with_gradients(kernels), with_gradients(reference)


def assert_equal(ours, theirs, tolerance=1e-5):
    for name, a, b in zip(("output", "q", "k", "v"), ours, theirs):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


PACKED = segments([(1, 50), (2, 150), (3, 30), (0, 26)], [(1, 256)])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="causal"),
        pytest.param({"segment_ids": PACKED}, id="packed, with padding"),
        pytest.param({"segment_ids": PACKED, "window": 40}, id="packed, in a window"),
        pytest.param({"window": 1}, id="a window of the token itself"),
        pytest.param({"window": 1000}, id="a window longer than the row"),
        pytest.param({"softcap": 2.0, "scale": 0.5}, id="bounded scores of another scale"),
    ],
)
def test_output_and_gradients_equal_reference(settings):
    assert_equal(*both(*inputs(2, 256, 2, 1, 16), **settings))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (8, 1)])
def test_query_head_uses_key_head_of_its_group(heads, kv_heads):
    assert_equal(*both(*inputs(1, 128, heads, kv_heads, 16)))


@pytest.mark.parametrize("length", [1, 200, 1030])
def test_row_may_have_any_length(length):
    # The last one has several blocks, of which a window of 300 lets the kernels skip some.
    segment_ids = segments([(1, length - length // 3), (0, length // 3)])
    assert_equal(*both(*inputs(1, length, 1, 1, 8), segment_ids=segment_ids, window=300))


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_heads_have_sizes_of_real_models(head_dim):
    assert_equal(*both(*inputs(1, 128, 2, 1, head_dim)))


def test_bfloat16_is_as_near_to_float32_as_reference():
    exact = both(*inputs(1, 256, 4, 2, 80))[1]
    ours, theirs = both(*inputs(1, 256, 4, 2, 80, jnp.bfloat16))
    for x, a, b in zip(exact, ours, theirs):
        assert a.dtype == jnp.bfloat16
        errors = [float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - x) ** 2))) for y in (a, b)]
        assert 0 < errors[0] < 1.5 * errors[1]


def test_rows_and_heads_are_split_over_devices():
    ids = segments(*[[(1, 60 + 4 * row), (2, 68 - 4 * row)] for row in range(4)])
    qkv = inputs(4, 128, 4, 2, 16)
    ours, theirs = both(*qkv, segment_ids=ids, window=50, mesh=make_mesh(MeshConfig(2, 2, 2)))
    assert_equal(ours, theirs)
    assert {shard.data.shape for shard in ours[0].addressable_shards} == {(1, 128, 2, 16)}


def test_layers_choose_among_windows_inside_scan_with_rematerialization():
    """As in a forward pass whose layers attend differently: branches of one program, by the layer's number."""
    q, k, v, gradient = inputs(1, 128, 2, 1, 8)
    windows, ids = (None, 20, 5), segments([(1, 100), (2, 28)])
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    q, k, v = (jnp.repeat(x, 2, axis=2) for x in (q, k, v))

    def stack(attend):
        def layer(x, kind):
            return x + jax.lax.switch(kind, [lambda y, w=w: attend(y, w) for w in windows], x), None

        def run(x):
            return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, jnp.asarray([0, 1, 2, 1]))[0]

        out, pull = jax.vjp(run, q)
        return out, *pull(jnp.repeat(gradient, 2, axis=2))

    def kernels(x, window):
        settings = {"config": AttentionConfig(), "segment_ids": ids, "window": window, "interpret": True}
        return splash_attention(x, k, v, **settings, sharding=ActivationSharding(mesh))

    def reference(x, window):
        return reference_attention(x, k, v, packed_mask(128, ids, window), AttentionConfig())

    assert_equal(jax.jit(lambda: stack(kernels))(), jax.jit(lambda: stack(reference))())


def test_heads_that_are_split_differently_are_refused():
    q, k, v, _ = inputs(1, 128, 2, 2, 8)
    rules = dataclasses.replace(TRAIN_RULES, kv_heads=None)
    settings = {"config": AttentionConfig(), "segment_ids": None, "window": None, "interpret": True}
    with pytest.raises(ValueError, match="key heads over None"):
        splash_attention(q, k, v, **settings, sharding=ActivationSharding(ONE, rules))


COMPILE = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from isheep_jax.model.attention_reference import AttentionConfig
    from isheep_jax.model.attention_splash import splash_attention
    from isheep_jax.planning.hardware import prepare_environment, slice_devices
    from isheep_jax.sharding import AXES, ActivationSharding

    topology, T, N, K, H = "{topology}", 2048, 16, 4, {head_dim}
    prepare_environment(topology)
    mesh = Mesh(np.array(slice_devices(topology, 1)[:4]).reshape(1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    heads = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    q, k = (jax.ShapeDtypeStruct((4, T, n, H), jnp.bfloat16, sharding=heads) for n in (N, K))
    ids = jax.ShapeDtypeStruct((4, T), jnp.int32, sharding=rows)

    def loss(q, k, v, ids):
        settings = dict(config=AttentionConfig(softcap=30.0), segment_ids=ids, sharding=ActivationSharding(mesh))
        branches = [lambda q, k, v, w=w: splash_attention(q, k, v, window=w, **settings) for w in (None, 300)]

        def layer(x, kind):
            return jax.lax.switch(kind, branches, x, k, v), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), q, jnp.asarray([0, 1, 0]))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, ids).compile()
    text = compiled.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert "splash_mqa_" + kernel in text, kernel
    scores = (4 // 2) * (N // 2) * T * T * 4  # bytes on a device, of one layer in float32
    assert compiled.memory_analysis().temp_size_in_bytes < scores, compiled.memory_analysis()
    print("compiled")
"""


@pytest.mark.tpu_compile
@needs_libtpu
@pytest.mark.parametrize(("topology", "head_dim"), [("v4-8", 128), ("v5e-4", 64), ("v5p-8", 256), ("v6e-4", 80)])
def test_kernels_compile_for_tpu(topology, head_dim):
    assert run_program(COMPILE.format(topology=topology, head_dim=head_dim)) == ["compiled"]


def test_other_keys_can_be_added_to_partial_attention():
    (q, k, v, _), (_, before_k, before_v, _) = inputs(2, 150, 4, 2, 64), inputs(2, 30, 4, 2, 64)
    ids = segments(((1, 100), (2, 50)), ((1, 150),))
    config = AttentionConfig()
    settings = {"config": config, "segment_ids": ids, "window": None, "sharding": ActivationSharding(ONE)}
    partial = splash_attention(q, k, v, **settings, partial=True, interpret=True)
    expected = reference_attention(q, k, v, packed_mask(150, ids), config)
    np.testing.assert_allclose(partial.finalize(q.dtype), expected, atol=1e-5)
    found = partial.update(q, before_k, before_v, jnp.ones((2, 150, 30), bool), config).finalize(q.dtype)
    both_k, both_v = (jnp.concatenate(pair, axis=1) for pair in ((before_k, k), (before_v, v)))
    mask = jnp.concatenate([jnp.ones((2, 150, 30), bool), packed_mask(150, ids)], axis=2)
    np.testing.assert_allclose(found, reference_attention(q, both_k, both_v, mask, config), atol=1e-5)
