"""Scoring by prefill alone: batches of packed prompts, and what the programs for choices and for texts share."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax import profiling
from isheep_jax.decode.cache import (
    alignment,
    bucket_of,
    constrain_cache,
    constrain_rows,
    data_shards,
    replicate,
)
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import PackedBatch, pack, pack_batch
from isheep_jax.decode.prefill import Prefix, forward_packed
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.transformer import logits

# Most positions of each row whose logits exist at the same time; a power of two.
_POSITIONS = 128

T = TypeVar("T")


class PackedItem(Protocol):
    """An id, and tokens [T] int32 to prefill."""

    id: str
    tokens: np.ndarray


def packed_batches(model: LoadedModel, items: Sequence[PackedItem]) -> Iterator[PackedBatch]:
    """Yields batches of one packed row for each data shard, longest items first, and counts them in the statistics."""
    items = sorted(items, key=lambda item: (-len(item.tokens), item.id))
    align, shards = alignment(model.mesh), data_shards(model.mesh)

    def batch(rows: list, length: int) -> PackedBatch:
        profiling.step()
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


@functools.partial(jax.jit, static_argnames=("collect_kv", "architecture", "mesh", "compute_dtype"))
def packed_logprobs(
    params: dict,
    packed: jax.Array,
    indices: jax.Array,
    targets: jax.Array,
    prefix: Prefix | None,
    *,
    collect_kv: bool,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, KVCache | None]:
    """Returns log-probabilities [R, U, C] (float32) of next tokens, and the keys and values of the rows or None.

    Args:
        params: weights.
        packed: [R, T, 4] int32, see `packing`.
        indices: [R, U] int32, tokens of the row; U is a power of two.
        targets: [R, U, C] int32, token ids that may follow those tokens.
        prefix: tokens that all the prompts follow.
        collect_kv: whether to return keys and values.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
    """
    packed, indices, targets = (constrain_rows(x, mesh) for x in (packed, indices, targets))
    hidden, cache = forward_packed(
        params,
        packed,
        prefix,
        architecture=architecture,
        mesh=mesh,
        compute_dtype=compute_dtype,
        collect_kv=collect_kv,
    )
    hidden = jnp.take_along_axis(hidden, indices[..., None], axis=1)  # [R, U, D]
    logprobs = target_logprobs(params, architecture, hidden, targets, compute_dtype)
    return replicate(logprobs, mesh), constrain_cache(cache, mesh) if collect_kv else None


def target_logprobs(
    params: dict, architecture: Architecture, hidden: jax.Array, targets: jax.Array, compute_dtype: jnp.dtype
) -> jax.Array:
    """Returns log-probabilities [R, U, C] (float32) of next tokens, computed a few positions at a time.

    Args:
        params: weights.
        architecture: the model's.
        hidden: [R, U, D], hidden states; U is a power of two.
        targets: [R, U, C] int32, token ids.
        compute_dtype: of the product with the lm_head.
    """
    return _in_pieces(_logprobs, params, architecture, hidden, targets, compute_dtype)


def greedy_logprobs(
    params: dict, architecture: Architecture, hidden: jax.Array, targets: jax.Array, compute_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities as `target_logprobs`, and whether a token is the most probable one [R, U, C] (bool)."""

    def both(logits, targets):
        return _logprobs(logits, targets), targets == jnp.argmax(logits, axis=-1, keepdims=True)

    return _in_pieces(both, params, architecture, hidden, targets, compute_dtype)


def _logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns log-probabilities [..., C] of token ids [..., C] by logits [..., V]."""
    chosen = jnp.take_along_axis(logits, targets, axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _in_pieces(
    score: Callable[[jax.Array, jax.Array], Any],
    params: dict,
    architecture: Architecture,
    hidden: jax.Array,
    targets: jax.Array,
    compute_dtype: jnp.dtype,
) -> Any:
    """Returns scores [R, U, C], a few positions at a time.

    Args:
        score: returns arrays [R, U', C] from logits [R, U', V] and token ids [R, U', C].
        params: weights.
        architecture: the model's.
        hidden: [R, U, D], hidden states; U is a power of two.
        targets: [R, U, C] int32, token ids.
        compute_dtype: of the product with the lm_head.
    """
    R, U, C = targets.shape

    def piece_scores(piece):
        hidden, targets = piece
        return score(logits(params, architecture, hidden, compute_dtype), targets)

    size = min(U, _POSITIONS)
    pieces = [x.reshape(R, U // size, size, -1).swapaxes(0, 1) for x in (hidden, targets)]
    scores = jax.lax.map(piece_scores, tuple(pieces))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(R, U, C), scores)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`; a size is rounded so, and few shapes are compiled."""
    return 1 << max(count - 1, 0).bit_length()
