"""The nearest of many vectors by brute force: matrix products on the device, block after block.

Exact, ties included. Elements of float16 vectors of length 1 are multiples of 2^-24, so every partial sum of a product
of two of them is a multiple of 2^-48 below 2: exact in float64, in whatever order it is formed. The device finds
candidates in float32; the host orders them by their exact products, and looks further where an error of float32 could
have left one out. So the result is the same on every machine and with every mesh.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.decode.cache import data_shards, replicate

# Vectors that are on the devices at a time: bytes in float16, and count.
BLOCK_BYTES = 64 * 2**20
BLOCK_ROWS = 65536
# Queries that are compared at a time, which bounds the memory of the products.
QUERIES = 256
# Candidates beyond those asked for.
SPARE = 32
# Of the unit roundoff of float32 per dimension: the bound of a dot product's error, doubled for products on a TPU.
_ERROR = 2 * 2.0**-24


class Index:
    """Vectors to search in. vectors: [N, D] of any float dtype; they are scaled to length 1 and kept as float16.

    They stay on the host and pass through the devices in blocks, so that a million of them need no room beside the
    weights. mesh: its `data` axis shares each block; None: one device.
    """

    def __init__(self, vectors: np.ndarray, mesh: Mesh | None = None):
        self._vectors, self._mesh = unit(vectors), mesh
        count, width = self._vectors.shape
        shards = data_shards(mesh)
        rows = max(min(BLOCK_BYTES // (2 * max(width, 1)), BLOCK_ROWS, count), 1)
        self._rows = -(-rows // shards) * shards

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Indices [Q, min(count, N)] (int64) of the vectors with the highest cosine to each of the queries [Q, D].

        Best first; of equals the one with the lowest index.
        """
        queries = unit(queries)
        count = min(count, len(self))
        if not count or not len(queries):
            return np.zeros((len(queries), count), np.int64)
        parts = [self._some(queries[i : i + QUERIES], count) for i in range(0, len(queries), QUERIES)]
        return np.concatenate(parts)

    def _some(self, queries: np.ndarray, count: int) -> np.ndarray:
        wanted = min(count + SPARE, len(self))
        # A power of two, so that few programs are compiled for the last block of queries.
        padded = np.zeros((1 << (len(queries) - 1).bit_length(), queries.shape[1]), np.float16)
        padded[: len(queries)] = queries
        best = (np.full((len(padded), wanted), -np.inf, np.float32), np.zeros((len(padded), wanted), np.int32))
        for first, block in self._blocks():
            best = _merge(padded, block, np.int32(first), np.int32(len(self)), best, mesh=self._mesh)
        scores, found = (np.asarray(x)[: len(queries)] for x in best)
        exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), self._vectors[found].astype(np.float64))
        order = np.lexsort((found, -exact))[:, :count]
        result = np.take_along_axis(found, order, axis=1).astype(np.int64)
        if wanted < len(self):
            worst = np.take_along_axis(exact, order[:, -1:], axis=1)[:, 0]
            # What is no candidate scored at most as the last candidate did, give or take the error.
            unsure = worst <= scores[:, -1].astype(np.float64) + _ERROR * queries.shape[1]
            for i in np.flatnonzero(unsure):
                result[i] = self._exactly(queries[i], count)
        return result

    def _blocks(self) -> Iterator[tuple[int, jax.Array]]:
        """Index of its first vector, and each block [rows, D] (float16); the last is filled up with zeros."""
        for first in range(0, len(self), self._rows):
            block = self._vectors[first : first + self._rows]
            if len(block) < self._rows:
                block = np.concatenate([block, np.zeros((self._rows - len(block), block.shape[1]), np.float16)])
            if self._mesh is None:
                yield first, jax.device_put(block)
            else:
                place = NamedSharding(self._mesh, PartitionSpec("data"))
                yield first, jax.make_array_from_callback(block.shape, place, lambda at, block=block: block[at])

    def _exactly(self, query: np.ndarray, count: int) -> np.ndarray:
        query = query.astype(np.float64)
        blocks = [self._vectors[i : i + self._rows] for i in range(0, len(self), self._rows)]
        scores = np.concatenate([block.astype(np.float64) @ query for block in blocks])
        return np.argsort(-scores, kind="stable")[:count]


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors [N, D] scaled to length 1, in float16; zeros stay zeros."""
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
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Scores [Q, K] (float32) and indices [Q, K] (int32) of the best so far, those of another block included."""
    scores = jnp.einsum(
        "qd,nd->qn", queries.astype(jnp.float32), block.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    index = first + jnp.arange(block.shape[0], dtype=jnp.int32)
    scores = jnp.where(index < total, scores, -jnp.inf)
    here, at = jax.lax.top_k(scores, min(best[0].shape[1], block.shape[0]))
    values, indices = (jnp.concatenate([old, new], axis=1) for old, new in zip(best, (here, index[at])))
    values, at = jax.lax.top_k(values, best[0].shape[1])
    return replicate(values, mesh), replicate(jnp.take_along_axis(indices, at, axis=1), mesh)
