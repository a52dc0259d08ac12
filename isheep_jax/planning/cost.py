"""Counts the arithmetic and memory traffic of the programs from the architecture, and bounds their time by a roofline.

The compiler's own count has the body of each loop once; a test compares these counts with it on a model of one layer.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from isheep_jax.config import Config
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.planning import programs
from isheep_jax.planning.hardware import Chip
from isheep_jax.planning.programs import Meshes, Program


@dataclass(frozen=True)
class Cost:
    """The least that a step needs on one chip: operations, bytes to and from HBM, bytes sent to other chips."""

    flops: float
    hbm_bytes: float
    interconnect_bytes: float


@dataclass(frozen=True)
class Bound:
    """The least possible time of a step. seconds: the largest of the three parts. by: the name of that part."""

    seconds: float
    by: str
    compute: float
    memory: float
    interconnect: float


def bound(cost: Cost, chip: Chip) -> Bound:
    """Returns the roofline (Williams, Waterman and Patterson 2009): everything overlaps and runs at its peak rate."""
    parts = {
        "compute": cost.flops / chip.flops,
        "memory": cost.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": cost.interconnect_bytes / chip.interconnect if chip.interconnect else 0.0,
    }
    by = max(parts, key=parts.__getitem__)
    return Bound(parts[by], by, **parts)


def matrix_parameters(architecture: Architecture) -> tuple[int, int]:
    """Returns the number of weights that every token is multiplied with: (all layers, lm_head)."""
    table = parameter_table(architecture)
    layers = sum(math.prod(s.shape) for s in table["layers"].values() if s.is_matrix)
    return layers, architecture.vocab_size * architecture.hidden_size


def forward_flops(architecture: Architecture, tokens: float, length: float) -> tuple[float, float]:
    """Returns the operations of the layers for `tokens` tokens that each attend to `length` positions.

    Returns (matrices, attention). Masked positions are computed as well. Norms, RoPE and softmax are left out: they are
    below one percent.
    """
    a = architecture
    layers, _ = matrix_parameters(a)
    return 2.0 * layers * tokens, 4.0 * a.layers * a.heads * a.head_dim * tokens * length


def program_flops(
    program: Program, config: Config, architecture: Architecture, positions: float | None = None
) -> float:
    """Returns the operations of one step of a program on all chips, including recomputation.

    positions: cache positions that a decode step reads of each slot; None: `decode.max_length`.
    """
    decode, sft = config.decode, config.sft
    _, lm_head = matrix_parameters(architecture)
    if program.name == programs.DECODE:
        length = decode.max_length if positions is None else positions
        return sum(forward_flops(architecture, program.rows, length)) + 2.0 * lm_head * program.rows
    if program.name == programs.PREFILL:
        return sum(forward_flops(architecture, program.tokens, decode.max_length))
    if program.name == programs.SCORE:
        return sum(forward_flops(architecture, program.tokens, decode.max_length)) + 2.0 * lm_head * program.rows
    matrices, attention = forward_flops(architecture, program.tokens, sft.sequence_length)
    recomputed, attends_again = sft.remat == "full", sft.remat != "none"
    # In the backward pass the gradient of the inputs costs as much as the forward pass, and so does the gradient of the
    # weights, which frozen weights do not have. Attention has no weights, but two inputs to each of its products.
    weight_gradients = sft.method == "full"
    if sft.method == "lora":
        adapters = sum(math.prod(s.shape[1:]) for s in _adapter_matrices(architecture, sft.lora_rank))
        matrices_lora = 2.0 * architecture.layers * adapters * program.tokens * (3 + recomputed)
    else:
        matrices_lora = 0.0
    return (
        matrices * (2 + recomputed + weight_gradients)
        + attention * (3 + attends_again)
        # The loss always computes its logits a second time.
        + 2.0 * lm_head * program.tokens * (3 + weight_gradients)
        + matrices_lora
    )


def program_hbm_bytes(
    program: Program,
    config: Config,
    architecture: Architecture,
    meshes: Meshes,
    positions: float | None = None,
) -> float:
    """Returns the bytes that a step moves at least on a chip: weights, state, cache, gathered layers, activations.

    Args:
        program: at its shape.
        config: settings.
        architecture: the model's.
        meshes: those of the config.
        positions: cache positions that a decode step reads of each slot; None: `decode.max_length`.
    """
    a, itemsize = architecture, jnp.dtype(config.model.compute_dtype).itemsize
    layers, lm_head = matrix_parameters(a)
    if program.name != programs.TRAIN:
        # A step reads only a few rows of the embedding.
        stored = 1 if config.decode.weights_dtype == "int8" else itemsize
        embedding = 0 if a.tied_embeddings else lm_head * stored / meshes.decode.shape["tensor"]
        if program.name == programs.DECODE:
            read = 1.0 if positions is None else positions / config.decode.max_length
            return program.weights - embedding + read * program.cache
        # Scoring keeps its keys and values in floats.
        stored = 1 if config.decode.kv_cache_dtype == "int8" and program.name == programs.PREFILL else itemsize
        written = 2 * a.layers * a.kv_heads * a.head_dim * stored * program.tokens / meshes.decode.size
        return program.weights - embedding + 2 * written
    mesh, sft = meshes.train, config.sft
    passes = 2 + (sft.remat == "full")
    used = (layers + lm_head) * itemsize / mesh.shape["tensor"]
    gathered = used * passes * (2 if mesh.shape["fsdp"] > 1 else 1)  # the gather writes, the product reads
    trained = 2 * (program.optimizer + (program.weights if sft.method == "full" else 0.0))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    saved = 2 * a.layers * a.hidden_size * itemsize * program.tokens / rows
    return trained + gathered + saved


def _adapter_matrices(architecture: Architecture, rank: int) -> list:
    from isheep_jax.model.lora import lora_table

    return [spec for pair in lora_table(architecture, rank)["layers"].values() for spec in pair.values()]
