"""k-means against groups that can be told apart by hand, and against the definition of its fixed point."""

import numpy as np
import pytest

from isheep_jax.loop.filters.clusters import decode, encode, k_means

BLOBS = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)


def points(seed=0, each=30):
    rng = np.random.default_rng(seed)
    groups = np.arange(4 * each) % 4
    return BLOBS[groups] + rng.normal(0, 0.5, (4 * each, 2)).astype(np.float32), groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_far_apart_are_found_and_numbered_as_they_appear(seed):
    vectors, groups = points(seed)
    assert k_means(vectors, 4, seed).tolist() == groups.tolist()


def test_every_vector_is_nearest_to_the_mean_of_its_own_cluster():
    vectors = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    found = k_means(vectors, 12, seed=3)
    means = np.stack([vectors[found == k].mean(axis=0) for k in range(found.max() + 1)])
    distances = ((vectors[:, None] - means[None]) ** 2).sum(axis=2)
    own = distances[np.arange(300), found]
    assert (own <= distances.min(axis=1) + 1e-4).all()


def test_many_clusters_that_are_drawn_some_at_a_time_find_the_groups_too():
    # 150 groups of four far apart: a draw that ignored the distances would leave a third of them without a center.
    rng = np.random.default_rng(4)
    groups = np.arange(600) % 150
    vectors = (rng.normal(size=(150, 16))[groups] + rng.normal(0, 1e-3, (600, 16))).astype(np.float32)
    found = k_means(vectors, 200, seed=0)
    assert all(len(set(groups[found == k])) == 1 for k in range(found.max() + 1))


def test_the_seed_decides():
    vectors = np.random.default_rng(2).normal(size=(200, 4)).astype(np.float32)
    first, again, other = (k_means(vectors, 9, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_as_many_clusters_as_vectors_or_more_leave_each_alone_but_for_equal_ones():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [2, 2]], np.float32)
    for clusters in (3, 4, 100):
        assert k_means(vectors, clusters, 0).tolist() == [0, 1, 0, 2]
    assert k_means(vectors, 1, 0).tolist() == [0, 0, 0, 0]


def test_a_vector_comes_back_with_length_1():
    vector = decode(encode([3.0, 0.0, -4.0]))
    assert vector == pytest.approx([0.6, 0.0, -0.8], abs=1e-3)
    assert decode(encode([0.0, 0.0])).tolist() == [0.0, 0.0]
    assert decode(encode([1e30, 1.0])).tolist() == [1.0, 0.0]
