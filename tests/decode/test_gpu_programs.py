"""The programs of GPUs: attention by cuDNN, and a decode step in which the host has nothing to wait for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from architectures import small
from gpu_stand_in import stand_in
from jaxprs import equations

from isheep_jax.config import DecodeConfig, MeshConfig, SFTConfig
from isheep_jax.decode.cache import Sizing, abstract_cache
from isheep_jax.decode.device_slots import CACHE_POSITION, REMAINING, UPDATE_COLUMNS, new_slots
from isheep_jax.decode.packing import COLUMNS
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.programs import DecodeShape, compile_decode_steps, decode_steps
from isheep_jax.decode.sampling import DeviceSamplingParams
from isheep_jax.model.architecture import init_parameters
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.sft.data import Batch
from isheep_jax.sft.train_step import TrainSetup, build_train_programs
from isheep_jax.sharding import decode_mesh, make_mesh

# No other test has its sizes: programs are kept by them, and these are made for another platform.
ARCHITECTURE = small(vocab_size=67, layers=3, heads=6, kv_heads=2, head_dim=32, context_length=2048)
HEADS, BF16, T = 6, jnp.dtype("bfloat16"), 192
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
DECODE_MESH = decode_mesh(MESH, 1)


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def for_cuda(traced):
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def squares(text, length):
    """Shapes of arrays in a program, of which two axes are as long as a row."""
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<((?:\d+x)*\d+)x\w+>", text)}
    return {shape for shape in shapes if shape.count(length) >= 2}


def train_step_text(packing):
    config = SFTConfig(batch_size=2, sequence_length=T, packing=packing)
    programs = build_train_programs(TrainSetup.from_config(ARCHITECTURE, config, MESH, BF16))
    base = abstract_weights(ARCHITECTURE, "model", BF16)
    batch = Batch(*[int32(2, T)] * 5)
    return for_cuda(
        programs.train_step.trace(programs.abstract_state, base, batch, np.float32(1e-5), np.int32(0), np.uint32(0))
    )


def test_train_step_of_unpacked_rows_has_nothing_as_large_as_row_squared(monkeypatch):
    stand_in(monkeypatch)
    text = train_step_text(packing=False)
    assert re.search(r"__cudnn\$fmhaSoftmax\b", text)
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert not squares(text, T)


def test_train_step_of_packed_rows_has_one_mask_for_all_heads(monkeypatch):
    stand_in(monkeypatch)
    text = train_step_text(packing=True)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert squares(text, T)
    assert not {shape for shape in squares(text, T) if HEADS in shape or HEADS // 2 in shape}


def test_prefill_has_one_mask_for_all_heads(monkeypatch):
    stand_in(monkeypatch)
    params = abstract_weights(ARCHITECTURE, "model", BF16)
    cache = abstract_cache(ARCHITECTURE, 4, 512, BF16, DECODE_MESH)
    settings = {"architecture": ARCHITECTURE, "mesh": DECODE_MESH, "compute_dtype": BF16}
    text = for_cuda(prefill.trace(params, cache, int32(1, T, COLUMNS), None, **settings))
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert not {shape for shape in squares(text, T) if HEADS in shape or HEADS // 2 in shape}


def decode_shape(slots=4, **changes):
    config = DecodeConfig(slots=slots, max_length=1024, steps_per_call=4)
    nominal = DecodeShape.nominal(config, ARCHITECTURE, mesh=DECODE_MESH, compute_dtype=BF16, eos_ids=(1,))
    return dataclasses.replace(nominal, **changes)


def primitives_in_layers(shape):
    """Names of the operations in the scan over layers of a decode step."""
    params = abstract_weights(ARCHITECTURE, "model", BF16)
    slots = jax.eval_shape(lambda: new_slots(ARCHITECTURE, shape.slots, 1024, BF16, DECODE_MESH, penalties=False))
    sampling = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), DeviceSamplingParams())
    arguments = params, slots, int32(shape.slots, UPDATE_COLUMNS), sampling, int32(2)
    program = jax.make_jaxpr(lambda *arguments: decode_steps(*arguments, None, shape=shape))(*arguments)
    layers = [e for e in equations(program) if e.primitive.name == "scan" and e.params["length"] == ARCHITECTURE.layers]
    assert len(layers) == 1
    return [e.primitive.name for e in equations(layers[0].params["jaxpr"])]


def test_host_waits_for_nothing_within_decode_step_without_kernel(monkeypatch):
    assert "while" in primitives_in_layers(decode_shape())  # as on TPUs, where it is part of the program
    stand_in(monkeypatch, None)
    assert decode_shape().key_limit == 1024
    for key_limit in (512, 1024):
        assert not {"while", "pallas_call"} & set(primitives_in_layers(decode_shape(slots=5, key_limit=key_limit)))


def test_decode_step_has_kernel_that_reads_cache_in_place(monkeypatch):
    stand_in(monkeypatch)
    shape = decode_shape(slots=6)
    assert shape.reads_sequences_alone
    assert not dataclasses.replace(shape, kv_cache_dtype="int8").reads_sequences_alone
    names = primitives_in_layers(shape)
    assert names.count("pallas_call") == 1
    # A loop is one of the kernel, and no block of the cache is taken out of it.
    assert names.count("while") == 1
    assert "dynamic_slice" not in names


def test_limit_of_keys_changes_no_token_if_sequences_stay_below_it():
    params = init_parameters(ARCHITECTURE, jax.random.key(0))
    ends = np.linspace(0, 250, 8)

    def sampled(key_limit):
        shape = decode_shape(slots=8, key_limit=key_limit, compute_dtype=jnp.dtype("float32"))
        slots = new_slots(ARCHITECTURE, 8, 1024, jnp.dtype("float32"), DECODE_MESH, penalties=False)
        leaves, tree = jax.tree.flatten(slots.cache)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        cache = tree.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)])
        updates = np.ones((8, UPDATE_COLUMNS), np.int32)
        updates[:, CACHE_POSITION], updates[:, REMAINING] = ends, 100
        program = compile_decode_steps(shape, shape)
        limits = np.asarray([8, 0], np.int32)
        tokens = program(params, slots.replace(cache=cache), updates, DeviceSamplingParams(), limits, None)[1]
        return np.asarray(tokens)[0]

    tokens = sampled(0)
    np.testing.assert_array_equal(tokens, sampled(256))
    assert (tokens != sampled(128))[ends > 128].any()


def test_limits_of_keys_are_few_and_near(monkeypatch):
    assert Sizing.of(DECODE_MESH).key_limit(700) == 0
    stand_in(monkeypatch)
    limits = [Sizing.of(DECODE_MESH).key_limit(positions) for positions in range(1, 8193)]
    assert sorted(set(limits)) == [512, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
    assert all(positions <= limit < max(2 * positions, 513) for positions, limit in enumerate(limits, start=1))
