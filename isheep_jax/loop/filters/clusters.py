"""Clusters of instructions by k-means on their embeddings (I-SHEEP section 4.3, the density filter)."""

import base64
from collections.abc import Sequence

import numpy as np

# Rounds after which k-means stops even if vectors still change their cluster.
MAX_ROUNDS = 50
# Approximate number of passes over the vectors in which the first centers are drawn.
INITIAL_PASSES = 64
# Vectors compared with all centers at a time; it bounds the memory of the products.
_BLOCK = 4096


def encode(vector: Sequence[float]) -> str:
    """Returns the vector scaled to length 1, as little-endian float16 in base64."""
    values = np.asarray(vector, np.float64)
    values = values / max(float(np.linalg.norm(values)), 1e-12)
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """Returns the float32 vector [D] that `encode` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


def k_means(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each of the vectors [N, D], as int64 [N], numbered 0, 1, ... in the order of first appearance.

    Runs Lloyd's algorithm from centers drawn by k-means++ (Arthur & Vassilvitskii 2007). If there are fewer different
    vectors than `clusters`, there are fewer clusters.
    """
    vectors = np.asarray(vectors, np.float32)
    centers = _first_centers(vectors, clusters, np.random.default_rng(seed))
    nearest = _nearest(vectors, centers)
    for _ in range(MAX_ROUNDS):
        # A center without vectors does not move.
        filled, starts, sizes = np.unique(np.sort(nearest), return_index=True, return_counts=True)
        sums = np.add.reduceat(vectors[np.argsort(nearest, kind="stable")], starts, axis=0, dtype=np.float64)
        centers[filled] = (sums / sizes[:, None]).astype(np.float32)
        before, nearest = nearest, _nearest(vectors, centers)
        if np.array_equal(before, nearest):
            break
    _, first, inverse = np.unique(nearest, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse.reshape(-1)]


def _first_centers(vectors: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Vectors drawn with a probability proportional to the squared distance to the nearest one drawn before.

    Many centers are drawn several per pass (the idea of k-means||, Bahmani et al. 2012): with one pass over the vectors
    per center, this would take longer than the rounds that follow.
    """
    per_pass = max(1, clusters // INITIAL_PASSES)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    distances = np.full(len(vectors), np.inf, np.float32)
    chosen, last = [], np.array([rng.integers(len(vectors))])
    while True:
        chosen.extend(last.tolist())
        scale = squares[:, None] + squares[last]
        to_last = scale - 2 * (vectors @ vectors[last].T)
        # Equal vectors differ by rounding only.
        distances = np.minimum(distances, np.where(to_last > 1e-6 * scale, to_last, 0).min(axis=1))
        total = np.cumsum(distances, dtype=np.float64)
        missing = min(clusters, len(vectors)) - len(chosen)
        if missing <= 0 or not total[-1] > 0:
            return vectors[chosen]
        drawn = np.searchsorted(total, rng.random(min(missing, per_pass)) * total[-1], side="right")
        last = np.unique(np.minimum(drawn, len(vectors) - 1))


def _nearest(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Index [N] of the center nearest to each vector by Euclidean distance; the first of equally near ones."""
    half_squares = 0.5 * np.einsum("kd,kd->k", centers, centers)
    blocks = [vectors[i : i + _BLOCK] @ centers.T - half_squares for i in range(0, len(vectors), _BLOCK)]
    return np.concatenate([np.argmax(block, axis=1) for block in blocks])
