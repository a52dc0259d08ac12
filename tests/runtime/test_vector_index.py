"""The nearest vectors are exactly numpy's, ties included, for all block sizes and numbers of devices."""

import numpy as np
import pytest
from meshes import mesh_of

from isheep_jax.runtime import vector_index
from isheep_jax.runtime.vector_index import Index, unit


def exact(vectors, queries, count):
    """All products in float64, best first, the lowest index of equals first."""
    scores = unit(queries).astype(np.float64) @ unit(vectors).astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=["one device", "a mesh"])
def mesh(request):
    return mesh_of() if request.param == "one device" else mesh_of((8, 1, 1))


@pytest.mark.parametrize("count", [1, 7, 300])
def test_ranking_is_that_of_exact_products(monkeypatch, mesh, count):
    monkeypatch.setattr(vector_index, "BLOCK_ROWS", 100)
    monkeypatch.setattr(vector_index, "QUERY_BATCH", 8)
    vectors, queries = normal(0, 730, 48), normal(1, 21, 48)
    np.testing.assert_array_equal(Index(vectors, mesh).nearest(queries, count), exact(vectors, queries, count))


def test_lowest_index_comes_first_among_equal_vectors(monkeypatch, mesh):
    monkeypatch.setattr(vector_index, "BLOCK_ROWS", 64)
    few = normal(2, 5, 32)
    vectors = few[np.random.default_rng(3).integers(5, size=500)]
    # Vectors of the same direction are equal at any length.
    vectors[::7] *= 2.0
    queries = np.concatenate([few, normal(4, 4, 32)])
    found = Index(vectors, mesh).nearest(queries, 120)
    np.testing.assert_array_equal(found, exact(vectors, queries, 120))
    assert (np.diff(found[0][:50]) > 0).all()


def test_differences_below_error_of_float32_decide(monkeypatch):
    monkeypatch.setattr(vector_index, "SPARE", 2)
    monkeypatch.setattr(vector_index, "BLOCK_ROWS", 50)
    base = normal(5, 1, 512)
    # Neighbors whose products differ from the ninth digit on.
    vectors = np.repeat(unit(base), 300, axis=0)
    small = np.argsort(np.abs(vectors[0]))[:300]
    vectors[np.arange(300), small] = np.nextafter(vectors[np.arange(300), small], np.float16(1))
    monkeypatch.setattr(vector_index, "unit", lambda x: x)
    queries = np.asarray(unit(base), np.float16)
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    assert 0 < np.diff(np.sort(scores[0])[-20:]).max() < 1e-6
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(Index(vectors, mesh_of()).nearest(queries, 20), expected)


def test_there_may_be_fewer_vectors_than_asked_for_or_none():
    vectors = normal(6, 3, 16)
    assert Index(vectors, mesh_of()).nearest(vectors[:2], 10).tolist() == exact(vectors, vectors[:2], 3).tolist()
    assert Index(vectors, mesh_of()).nearest(np.zeros((0, 16), np.float32), 2).shape == (0, 2)
    assert Index(np.zeros((0, 16), np.float32), mesh_of()).nearest(vectors, 2).shape == (3, 0)
    # A zero vector counts as orthogonal to all others.
    index = Index(np.stack([-vectors[0], 0 * vectors[0], vectors[0]]), mesh_of())
    assert index.nearest(vectors[:1], 3).tolist() == [[2, 1, 0]]
