"""Scoring by prefill alone: batches of packed prompts, and the program that choices and texts share."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import (
    alignment,
    bucket_of,
    constrain_cache,
    constrain_rows,
    data_shards,
    decode_setup,
    replicate,
)
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import POSITION, SEGMENT, TOKEN, PackedBatch, pack, pack_batch
from isheep_jax.decode.prefill import Prefix, prefix_kv, prefix_length
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.transformer import forward, logits

# Positions of each row whose logits exist at the same time.
_POSITIONS = 128

T = TypeVar("T")


class PackedItem(Protocol):
    """One item to pack: an id and the tokens [T] int32 to prefill."""

    id: str
    tokens: np.ndarray


def packed_batches(model: LoadedModel, items: Sequence[PackedItem]) -> Iterator[PackedBatch]:
    """Packs items into batches of one row for each data shard, longest first, and counts them in the statistics."""
    items = sorted(items, key=lambda item: (-len(item.tokens), item.id))
    align, shards = alignment(model.mesh), data_shards(model.mesh)

    def batch(rows: list, length: int) -> PackedBatch:
        model.statistics.prompt_tokens += sum(len(item.tokens) for row in rows for item, _ in row)
        model.statistics.padded_prompt_tokens += shards * length
        padding = [[]] * (shards - len(rows))
        return pack_batch([*rows, *padding], length, lambda item: item.tokens)

    waiting: dict[int, list[list[tuple[Any, int]]]] = {}
    for row in pack([len(item.tokens) for item in items], align):
        length = bucket_of(row.length, align)
        rows = waiting.setdefault(length, [])
        rows.append([(items[index], begin) for index, begin in zip(row.prompts, row.begins)])
        if len(rows) == shards:
            yield batch(waiting.pop(length), length)
    for length, rows in waiting.items():
        yield batch(rows, length)


def one_behind(calls: Iterable[T]) -> Iterator[T]:
    """Yields each call once the next one is dispatched, so that the devices work while the host reads results."""
    previous: list[T] = []
    for call in calls:
        yield from previous
        previous = [call]
    yield from previous


@functools.partial(jax.jit, static_argnames=("collect", "architecture", "mesh", "compute_dtype"))
def packed_logprobs(
    params: dict,
    packed: jax.Array,
    at: jax.Array,
    targets: jax.Array,
    prefix: Prefix | None,
    *,
    collect: bool,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, KVCache | None]:
    """Log-probabilities [R, U, C] (float32) of next tokens, and with `collect` the keys and values of the rows.

    Args:
      params: weights.
      packed: [R, T, 4] int32, see `packing`.
      at: [R, U] int32, indices in the row; the targets follow the tokens there.
      targets: [R, U, C] int32, token ids.
      prefix: tokens that all the prompts follow.
      collect: whether to return keys and values.
    """
    packed, at, targets = (constrain_rows(x, mesh) for x in (packed, at, targets))
    hidden, cache = forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., POSITION] + prefix_length(prefix),
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
        prefix_kv=prefix_kv(prefix),
        collect_kv=collect,
    )
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)  # [R, U, D]
    logprobs = target_logprobs(params, architecture, hidden, targets, compute_dtype)
    return replicate(logprobs, mesh), constrain_cache(cache, mesh) if collect else None


def target_logprobs(
    params: dict, architecture: Architecture, hidden: jax.Array, targets: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """Log-probabilities [R, U, C] of targets [R, U, C] after hidden states [R, U, D], a few positions at a time."""
    R, U, C = targets.shape

    def of_piece(piece):
        hidden, targets = piece
        piece_logits = logits(params, architecture, hidden, compute_dtype)
        chosen = jnp.take_along_axis(piece_logits, targets, axis=-1)
        return chosen - jax.nn.logsumexp(piece_logits, axis=-1, keepdims=True)

    size = min(U, _POSITIONS)
    pieces = [x.reshape(R, U // size, size, -1).swapaxes(0, 1) for x in (hidden, targets)]
    return jax.lax.map(of_piece, tuple(pieces)).swapaxes(0, 1).reshape(R, U, C)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`, and at least 1: few shapes are compiled."""
    return 1 << max(count - 1, 0).bit_length()
