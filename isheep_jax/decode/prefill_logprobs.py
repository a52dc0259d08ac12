"""Scoring by prefill alone: batches of packed prompts, and what the programs for choices and for texts share.

Prompts are tokenized a window at a time, the next window while the devices work on this one. What a window leaves of a
batch is filled up by the next ones.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax import profiling
from isheep_jax.decode.cache import Sizing, constrain_cache, constrain_rows, replicate
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import PackedBatch, pack, pack_batch
from isheep_jax.decode.prefill import Prefix, forward_packed
from isheep_jax.decode.statistics import Statistics
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.transformer import logits

# Most positions of each row whose logits exist at the same time; a power of two.
_POSITIONS = 128
# Inputs that are tokenized at a time: enough to fill rows with prompts of all lengths, and few enough that the devices
# need not wait long for the first ones.
_WINDOW = 512
# Prefilled prefixes that are kept. The requests of a call have one or two.
_PREFIXES = 4

T = TypeVar("T")
I = TypeVar("I")  # an input
R = TypeVar("R")  # a result
C = TypeVar("C")  # a call of the devices


class PackedItem(Protocol):
    """An id, the tokens that other prompts share, and the tokens [T] int32 to prefill after them."""

    id: str
    prefix: tuple[int, ...]
    tokens: np.ndarray


def score_packed(
    model: LoadedModel,
    inputs: Sequence[I],
    prepare: Callable[[Sequence[I]], tuple[list[R], list[PackedItem]]],
    dispatch: Callable[[PackedBatch, Prefix | None], C],
    read: Callable[[PackedBatch, C], Iterable[R]],
) -> Iterator[R]:
    """Yields the results of inputs as they come, and counts their tokens in the statistics.

    Args:
        model: what scores.
        inputs: requests, with whatever belongs to them.
        prepare: returns the results of inputs that cannot be prefilled, and the items of the others; another thread
            calls it.
        dispatch: calls the devices with one packed row for each data shard, all after the same prefix.
        read: returns the results of a call, for which it waits.
    """
    make_prefix = functools.lru_cache(maxsize=_PREFIXES)(model.make_prefix)

    def calls() -> Iterator[Callable[[], Iterable[R]]]:
        rows = PackedRows(model.sizing, model.statistics)
        for failed, items in _one_ahead(inputs, prepare):
            if failed:
                yield lambda failed=failed: failed
            for prefix, batch in rows.add(items):
                yield functools.partial(read, batch, dispatch(batch, make_prefix(prefix)))
        for prefix, batch in rows.rest():
            yield functools.partial(read, batch, dispatch(batch, make_prefix(prefix)))

    for results in _one_behind(calls()):
        yield from results()


class PackedRows:
    """Packed rows that wait until there is one for each data shard, of the same prefix and length."""

    def __init__(self, sizing: Sizing, statistics: Statistics):
        """Counts the tokens of rows in the statistics."""
        self._sizing, self._statistics = sizing, statistics
        self._waiting: dict[tuple[tuple[int, ...], int], list[list[tuple[PackedItem, int]]]] = {}

    def add(self, items: Iterable[PackedItem]) -> Iterator[tuple[tuple[int, ...], PackedBatch]]:
        """Packs items, the longest first, and yields the batches that are complete, with their prefix."""
        groups: dict[tuple[int, ...], list[PackedItem]] = defaultdict(list)
        for item in sorted(items, key=lambda item: (-len(item.tokens), item.id)):
            groups[item.prefix].append(item)
        for prefix, group in sorted(groups.items()):
            for row in pack([len(item.tokens) for item in group], self._sizing):
                key = prefix, self._sizing.row_length(row.length)
                rows = self._waiting.setdefault(key, [])
                rows.append([(group[index], begin) for index, begin in zip(row.prompts, row.begins)])
                if len(rows) == self._sizing.shards:
                    yield self._batch(key)

    def rest(self) -> Iterator[tuple[tuple[int, ...], PackedBatch]]:
        """Yields what is left, filled up with padding."""
        for key in sorted(self._waiting):
            yield self._batch(key)

    def _batch(self, key: tuple[tuple[int, ...], int]) -> tuple[tuple[int, ...], PackedBatch]:
        profiling.step()
        (prefix, length), rows = key, self._waiting.pop(key)
        self._statistics.prompt_tokens += sum(len(item.tokens) for row in rows for item, _ in row)
        self._statistics.padded_prompt_tokens += self._sizing.shards * length
        padding = [[]] * (self._sizing.shards - len(rows))
        return prefix, pack_batch([*rows, *padding], length, lambda item: item.tokens)


def input_windows(inputs: Sequence[I]) -> Iterator[Sequence[I]]:
    """Yields inputs some at a time, those that are tokenized and packed together."""
    return (inputs[begin : begin + _WINDOW] for begin in range(0, len(inputs), _WINDOW))


def _one_ahead(inputs: Sequence[I], prepare: Callable[[Sequence[I]], T]) -> Iterator[T]:
    """Yields what `prepare` returns for each window of inputs, the next of which it works on meanwhile."""
    windows = input_windows(inputs)
    with ThreadPoolExecutor(1, "isheep_jax tokenizing") as thread:
        yield from (future.result() for future in _one_behind(thread.submit(prepare, window) for window in windows))


def _one_behind(calls: Iterable[T]) -> Iterator[T]:
    """Yields each call once the next one is made, so that the devices work while the host reads results."""
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
