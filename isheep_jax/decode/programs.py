"""The two compiled programs of text generation: prefill of prompts into slots, and a chunk of decode steps.

Both are module-level, take the weights as arguments and the architecture as a static one, so that they compile once per
process and shape for all iterations of a run. Control state lives on the host as one small packed array per call; only
the KV cache stays on the devices, donated from call to call.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, SingleDeviceSharding

from isheep_jax.decode.cache import (
    cache_sharding,
    constrain_cache,
    constrain_rows,
    decode_activations,
    replicate,
    write_rows,
)
from isheep_jax.decode.sampling import sample
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.model.kv_cache import KVCache, init_cache
from isheep_jax.model.transformer import forward, logits
from isheep_jax.sharding import DECODE_RULES, param_shardings

Tree = Any

# Columns of the control array [B, 5] (int32) of a decode chunk, one row per slot.
TOKEN = 0  # the sequence's last token, whose keys and values are not in the cache yet
POSITION = 1  # where that token stands in its sequence
REMAINING = 2  # tokens that may still be drawn; 0: the slot is idle
KEY = slice(3, 5)  # the request's random key, bits of two uint32
CONTROL_COLUMNS = 5


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"), donate_argnames=("cache",))
def prefill(
    params: dict,
    cache: KVCache,
    packed: np.ndarray,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> KVCache:
    """Writes the keys and values of prompts into their slots.

    packed: [R, T + 1] int32; a row is a prompt padded to the bucket T, and its slot, which lies on the data shard of
    the row; slot -1 fills up the fixed shape. The first decode step comes back to the last token of a prompt, and so
    draws the first new token as it draws all others. Returns the cache.
    """
    packed = constrain_rows(packed, mesh)
    tokens, slots = packed[:, :-1], packed[:, -1]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    # What stands behind a prompt is written as well, and overwritten by new tokens before any token sees it.
    _, rows = forward(
        params,
        architecture,
        tokens,
        positions,
        collect=True,
        compute_dtype=compute_dtype,
        activations=decode_activations(mesh),
    )
    return constrain_cache(write_rows(cache, rows, slots, mesh), mesh)


def decode_chunk(
    params: dict,
    cache: KVCache,
    control: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    idle_limit: jax.Array,
    *,
    architecture: Architecture,
    chunk: int,
    end_ids: tuple[int, ...],
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> tuple[KVCache, jax.Array]:
    """Up to `chunk` decode steps of all slots.

    control: [B, 5] int32, see the columns above. temperature, top_p: scalars. idle_limit: scalar; the loop ends early
    when so many slots are idle. end_ids: tokens that end a sequence.
    Returns the cache and the drawn tokens [B, chunk] int32, end tokens included, -1 where a slot was idle.
    """
    control = constrain_rows(control, mesh)
    keys = jax.lax.bitcast_convert_type(control[:, KEY], jnp.uint32)
    slots = control.shape[0]

    def unfinished(carry):
        step, _, _, _, remaining, _ = carry
        return (step < chunk) & (jnp.sum(remaining == 0) < idle_limit)

    def advance(carry):
        step, cache, token, position, remaining, drawn = carry
        busy = remaining > 0
        written = jnp.where(busy, position, -1)
        hidden, cache = forward(
            params,
            architecture,
            token[:, None],
            written[:, None],
            cache=cache,
            compute_dtype=compute_dtype,
            activations=decode_activations(mesh),
        )
        scores = logits(params, architecture, hidden[:, 0], compute_dtype)
        new = sample(scores, keys, position + 1, temperature, top_p)
        ended = functools.reduce(jnp.logical_or, [new == end for end in end_ids], jnp.zeros_like(busy))
        drawn = drawn.at[:, step].set(jnp.where(busy, new, -1))
        left = jnp.where(ended, 0, remaining - 1)
        return (
            step + 1,
            constrain_cache(cache, mesh),
            jnp.where(busy, new, token),
            position + busy,
            jnp.where(busy, left, 0),
            drawn,
        )

    drawn = jnp.full((slots, chunk), -1, jnp.int32)
    start = (0, cache, control[:, TOKEN], control[:, POSITION], control[:, REMAINING], drawn)
    _, cache, _, _, _, drawn = jax.lax.while_loop(unfinished, advance, start)
    return cache, replicate(drawn, mesh)


@dataclass(frozen=True)
class DecodeProgram:
    """`decode_chunk` compiled for one shape. run: it, without its static arguments; the cache is donated.

    weights: for each parameter where it must lie.
    """

    run: Callable[..., tuple[KVCache, jax.Array]]
    weights: Tree


@functools.lru_cache(maxsize=8)
def compile_decode_chunk(
    architecture: Architecture,
    slots: int,
    context: int,
    *,
    chunk: int,
    end_ids: tuple[int, ...],
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> DecodeProgram:
    """Compiles ahead of time, once per process and shape. Arguments as in `lower_decode_chunk`."""
    compiled = lower_decode_chunk(
        architecture, slots, context, chunk=chunk, end_ids=end_ids, mesh=mesh, compute_dtype=compute_dtype
    ).compile()
    return DecodeProgram(compiled, compiled.input_formats[0][0])


def lower_decode_chunk(
    architecture: Architecture,
    slots: int,
    context: int,
    *,
    chunk: int,
    end_ids: tuple[int, ...],
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> jax.stages.Lowered:
    """The program for `slots` rows of `context` positions, on any devices, here or not.

    On TPUs the compiler chooses the layout of the weights: it would rather have some of them transposed, and would copy
    them in every chunk: 1.25 GiB per chip for Llama 3 70B on a v4-256, 4 % of its memory (planned).
    """
    table = parameter_table(architecture)
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        weights, split = jax.tree.map(lambda _: here, table), here
    else:
        weights, split = param_shardings(table, mesh, DECODE_RULES), cache_sharding(mesh)
    if decode_activations(mesh).platform == "tpu":
        weights = jax.tree.map(lambda sharding: Format(Layout.AUTO, sharding), weights)
    program = functools.partial(
        decode_chunk,
        architecture=architecture,
        chunk=chunk,
        end_ids=end_ids,
        mesh=mesh,
        compute_dtype=compute_dtype,
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(program, in_shardings=(weights, split, None, None, None, None), donate_argnums=1).lower(
        jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, compute_dtype), table),
        jax.eval_shape(lambda: init_cache(architecture, slots, context, compute_dtype)),
        jax.ShapeDtypeStruct((slots, CONTROL_COLUMNS), jnp.int32),
        scalar,
        scalar,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
