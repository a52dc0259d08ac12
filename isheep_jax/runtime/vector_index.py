"""Exact nearest neighbors by brute force: matrix products on the device, block after block.

The result is the same on every machine and with every mesh, ties included. Elements of float16 unit vectors are
multiples of 2^-24, so every partial sum of a dot product is a multiple of 2^-48 below 2, which float64 holds exactly in
any order of summation. The device finds candidates in float32; the host ranks them by their exact products, and
searches all vectors where a rounding error of float32 could have missed a candidate.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.decode.cache import data_shards, replicate

# Limits on the vectors of a block, which are on the devices at the same time: bytes in float16, and count.
BLOCK_BYTES = 64 * 2**20
BLOCK_ROWS = 65536
# Queries per batch, which bounds the memory of the products.
QUERY_BATCH = 256
# Candidates that the device finds beyond the requested count.
SPARE = 32
# Error bound of a float32 dot product per dimension: the unit roundoff, doubled for products on a TPU.
_ERROR_PER_DIMENSION = 2 * 2.0**-24


class Index:
    """Vectors to search in.

    vectors: [N, D] of any float dtype; scaled to unit length and kept as float16. They stay on the host and pass
    through the devices in blocks, so that a million of them fit next to the weights.
    mesh: its `data` axis splits each block.
    """

    def __init__(self, vectors: np.ndarray, mesh: Mesh):
        self._vectors, self._mesh = unit(vectors), mesh
        count, width = self._vectors.shape
        shards = data_shards(mesh)
        rows = max(min(BLOCK_BYTES // (2 * max(width, 1)), BLOCK_ROWS, count), 1)
        self._rows = -(-rows // shards) * shards

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Returns indices [Q, min(count, N)] (int64) of the vectors with the highest cosine to each query of [Q, D].

        The best comes first; among equals, the lowest index.
        """
        queries = unit(queries)
        count = min(count, len(self))
        if not count or not len(queries):
            return np.zeros((len(queries), count), np.int64)
        batches = (queries[i : i + QUERY_BATCH] for i in range(0, len(queries), QUERY_BATCH))
        return np.concatenate([self._nearest_of_batch(batch, count) for batch in batches])

    def _nearest_of_batch(self, queries: np.ndarray, count: int) -> np.ndarray:
        candidates = min(count + SPARE, len(self))
        # Padded to a power of two, so that few programs are compiled for the last batch of queries.
        padded = np.zeros((1 << (len(queries) - 1).bit_length(), queries.shape[1]), np.float16)
        padded[: len(queries)] = queries
        best = (np.full((len(padded), candidates), -np.inf, np.float32), np.zeros((len(padded), candidates), np.int32))
        for first, block in self._blocks():
            best = _merge(padded, block, np.int32(first), np.int32(len(self)), best, mesh=self._mesh)
        cosines, indices = (np.asarray(x)[: len(queries)] for x in best)
        exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), self._vectors[indices].astype(np.float64))
        order = np.lexsort((indices, -exact))[:, :count]
        result = np.take_along_axis(indices, order, axis=1).astype(np.int64)
        if candidates < len(self):
            worst = np.take_along_axis(exact, order[:, -1:], axis=1)[:, 0]
            # Any other vector is at most as near as the last candidate, up to the rounding error.
            unsure = worst <= cosines[:, -1].astype(np.float64) + _ERROR_PER_DIMENSION * queries.shape[1]
            for i in np.flatnonzero(unsure):
                result[i] = self._exactly(queries[i], count)
        return result

    def _blocks(self) -> Iterator[tuple[int, jax.Array]]:
        """Yields (index of the first vector, block [rows, D] in float16); the last block is padded with zeros."""
        for first in range(0, len(self), self._rows):
            block = self._vectors[first : first + self._rows]
            if len(block) < self._rows:
                block = np.concatenate([block, np.zeros((self._rows - len(block), block.shape[1]), np.float16)])
            sharding = NamedSharding(self._mesh, PartitionSpec("data"))
            yield first, jax.make_array_from_callback(block.shape, sharding, lambda i, block=block: block[i])

    def _exactly(self, query: np.ndarray, count: int) -> np.ndarray:
        query = query.astype(np.float64)
        blocks = [self._vectors[i : i + self._rows] for i in range(0, len(self), self._rows)]
        cosines = np.concatenate([block.astype(np.float64) @ query for block in blocks])
        return np.argsort(-cosines, kind="stable")[:count]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns the vectors [N, D] scaled to unit length, in float16; zero vectors stay zero."""
    scaled = np.empty(vectors.shape, np.float16)
    for first in range(0, len(vectors), BLOCK_ROWS):
        block = np.asarray(vectors[first : first + BLOCK_ROWS], np.float32)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        scaled[first : first + BLOCK_ROWS] = block / np.maximum(norms, 1e-12)
    return scaled


@functools.partial(jax.jit, static_argnames=("mesh",))
def _merge(
    queries: jax.Array,
    block: jax.Array,
    first: jax.Array,
    total: jax.Array,
    best: tuple[jax.Array, jax.Array],
    *,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Returns `best`, updated with another block: cosines [Q, K] (float32) and indices [Q, K] (int32).

    Args:
        queries: Unit vectors [Q, D] in float16.
        block: Unit vectors [rows, D] in float16.
        first: Index of the block's first vector.
        total: Number of vectors; indices from there on are padding.
        best: Cosines and indices of the best K vectors so far.
        mesh: The result is replicated over it.
    """
    cosines = jnp.einsum(
        "qd,nd->qn", queries.astype(jnp.float32), block.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    index = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    cosines = jnp.where(index < total, cosines, -jnp.inf)
    block_best, positions = jax.lax.top_k(cosines, min(best[0].shape[1], block.shape[0]))
    values, indices = (jnp.concatenate([old, new], axis=1) for old, new in zip(best, (block_best, index[positions])))
    values, positions = jax.lax.top_k(values, best[0].shape[1])
    return replicate(values, mesh), replicate(jnp.take_along_axis(indices, positions, axis=1), mesh)
