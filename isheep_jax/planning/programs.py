"""Lowers the jitted functions that decoding and training call on abstract arrays, at the shapes of a config."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import Config
from isheep_jax.decode import programs as decoding
from isheep_jax.decode.cache import (
    Sizing,
    abstract_cache,
    cache_sharding,
    check_rows,
    data_shards,
    rows_sharding,
)
from isheep_jax.decode.packing import COLUMNS
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.prefill_logprobs import packed_logprobs
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.model.quantization import abstract_weights, weight_table
from isheep_jax.sft import data, trainer
from isheep_jax.sft.train_step import TrainSetup, build_train_programs
from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh, param_shardings

Tree = Any

DECODE, PREFILL, SCORE, TRAIN = "decode", "prefill", "score", "train step"
# Decoding comes first because it chooses the layout of the weights that the next two programs use, which takes time.
NAMES = (DECODE, PREFILL, SCORE, TRAIN)

# Prompts in a row of scoring, and the choices "1" to "10" of each.
SCORED, CHOICES = 4, 10


@dataclass(frozen=True)
class Meshes:
    """The two meshes of a run, on the same devices."""

    train: Mesh
    decode: Mesh


@dataclass(frozen=True)
class Program:
    """A program at one shape.

    lower: makes the lowered program.
    weights, optimizer, cache: bytes of these arguments on one device, as the shardings split them.
    rows, tokens: size of the batch on all devices (decoding: of one step).
    compile: compiles the program by a function of decoding that caches it; None: `lower` is compiled.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    weights: float
    optimizer: float
    cache: float
    rows: int
    tokens: int
    compile: Callable[[], jax.stages.Compiled] | None = None


def make_meshes(config: Config, architecture: Architecture, devices: list[Any]) -> Meshes:
    """Makes the meshes. Raises `UserError` when settings, model and devices do not fit, before any compilation."""
    train = make_mesh(config.mesh, devices)
    meshes = Meshes(train, decode_mesh(train, config.mesh.decode_tensor))
    trainer.check_settings(config.sft, architecture, train)
    check_divisible(parameter_table(architecture), meshes.decode, DECODE_RULES)
    for name in ("slots", "max_length"):
        if not getattr(config.decode, name):
            meaning = {"slots": "the memory of the device", "max_length": "the memory and the model's context"}[name]
            example = f"--decode.{name}={ {'slots': 64, 'max_length': 2048}[name] }"
            raise UserError(f"--decode.{name}: 0 leaves it to {meaning}; a plan needs a number, for example {example}")
    check_rows("decode.slots", config.decode.slots, meshes.decode)
    if config.decode.max_length > architecture.context_length:
        raise UserError(
            f"decode.max_length={config.decode.max_length} is more than the model's context of "
            f"{architecture.context_length}"
        )
    return meshes


def few_slots(config: Config, mesh: Mesh) -> int:
    """Returns a quarter of the slots, at least one of each data shard: a decode step as a stage ends."""
    shards = data_shards(mesh)
    return max(shards, config.decode.slots // 4 // shards * shards)


def decode_shape(config: Config, architecture: Architecture, meshes: Meshes) -> decoding.DecodeShape:
    """Returns the shape of the decode program at the settings, see `DecodeShape.nominal`."""
    return decoding.DecodeShape.nominal(
        config.decode,
        architecture,
        mesh=meshes.decode,
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        eos_ids=architecture.eos_token_ids,
    )


def make_program(name: str, config: Config, architecture: Architecture, meshes: Meshes, size: int = 0) -> Program:
    """Makes a program, without a size at the shape that needs the most memory: prompts of `decode.max_length` tokens.

    Args:
        name: one of `NAMES`.
        config: settings.
        architecture: the model's.
        meshes: those of the config.
        size: slots of a decode step, tokens of a row of prefill and scoring; 0: those of the config.
    """
    if name == TRAIN:
        return _train(config, architecture, meshes.train)
    mesh, decode = meshes.decode, config.decode
    dtype = jnp.dtype(config.model.compute_dtype)
    static = {"architecture": architecture, "mesh": mesh, "compute_dtype": dtype}
    shape = decode_shape(config, architecture, meshes)
    shapes = abstract_weights(architecture, decode.weights_dtype, dtype)

    def abstract(shardings: Tree) -> Tree:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def params() -> Tree:  # compiles the decode program, which may not fit
        return abstract(decoding.weight_formats(shape))

    table = weight_table(architecture, decode.weights_dtype)
    weights = bytes_per_device(abstract(param_shardings(table, mesh, DECODE_RULES)))
    rows = data_shards(mesh)
    length = size or Sizing.of(mesh).longest_row(decode.max_length)
    int32_rows = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=rows_sharding(mesh))
    packed = int32_rows((rows, length, COLUMNS))
    if name == SCORE:
        positions, targets = int32_rows((rows, SCORED)), int32_rows((rows, SCORED, CHOICES))

        def lower_scoring() -> jax.stages.Lowered:
            return packed_logprobs.lower(params(), packed, positions, targets, None, collect_kv=True, **static)

        return Program(name, lower_scoring, weights, 0.0, 0.0, rows * SCORED, rows * length)
    cache = abstract_cache(architecture, decode.slots, decode.max_length, shape.cache_dtype, mesh)
    split = cache_sharding(mesh)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), cache)
    cache_bytes = bytes_per_device(cache)
    if name == PREFILL:

        def lower_prefill() -> jax.stages.Lowered:
            return prefill.lower(params(), cache, packed, None, **static)

        return Program(name, lower_prefill, weights, 0.0, cache_bytes, rows, rows * length)
    slots = size or decode.slots
    return Program(
        name,
        lambda: decoding.lower_nominal(shape),
        weights,
        0.0,
        cache_bytes * slots / decode.slots,
        slots,
        slots,
        # The programs above use the same compiled program for its sizing.
        compile=lambda: decoding.compile_decode_steps(dataclasses.replace(shape, slots=slots), shape),
    )


def _train(config: Config, architecture: Architecture, mesh: Mesh) -> Program:
    sft = config.sft
    run = build_train_programs(TrainSetup.from_config(architecture, sft, mesh, config.model.compute_dtype))
    base = {}
    if sft.method == "lora":
        dtype = jnp.dtype(config.model.compute_dtype)
        base = jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
            parameter_table(architecture),
            run.parameter_shardings,
        )
    shape = (sft.batch_size, sft.sequence_length)
    column = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=run.batch_sharding)
    batch = data.Batch(column, column, column, column, column)
    scalars = np.float32(1e-5), np.int32(0), np.uint32(0)
    return Program(
        name=TRAIN,
        lower=lambda: run.train_step.lower(run.abstract_state, base, batch, *scalars),
        weights=bytes_per_device(run.abstract_state.weights) + bytes_per_device(base),
        optimizer=bytes_per_device(run.abstract_state.optimizer),
        cache=0.0,
        rows=shape[0],
        tokens=math.prod(shape),
    )


def bytes_per_device(tree: Tree) -> float:
    """Returns the bytes of abstract arrays on one device."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    )
