"""The two compiled programs of text generation: prefill of prompts into slots, and a chunk of decode steps.

Both are module-level, take the weights as arguments and the architecture as a static one, so that they compile once per
process and shape for all iterations of a run. Control state lives on the host as one small packed array per call; only
the KV cache stays on the devices, donated from call to call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import constrain_cache, constrain_rows, decode_activations, replicate, write_rows
from isheep_jax.decode.sampling import sample
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.transformer import forward, logits

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


@functools.partial(
    jax.jit,
    static_argnames=("architecture", "chunk", "end_ids", "mesh", "compute_dtype"),
    donate_argnames=("cache",),
)
def decode_chunk(
    params: dict,
    cache: KVCache,
    control: np.ndarray,
    temperature: np.ndarray,
    top_p: np.ndarray,
    idle_limit: np.ndarray,
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
