"""Collectives have the links that their mesh axis has on the torus of its slice."""

import importlib.util
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from isheep_jax.named_configs import config_names, named_config
from isheep_jax.planning.collectives import Collective
from isheep_jax.planning.hardware import parse_topology, slice_devices
from isheep_jax.planning.torus import HOP, Torus
from isheep_jax.sharding import decode_mesh, make_mesh


def torus(name: str, sizes: tuple[int, ...]) -> Torus:
    """A slice whose chips are a mesh in the order of their coordinates."""
    described = parse_topology(name)
    places = list(itertools.product(*map(range, described.shape)))
    chips = np.empty(len(places), object)
    chips[:] = [SimpleNamespace(coords=(*place, 0), slice_index=0) for place in places]
    return Torus.of(SimpleNamespace(devices=chips.reshape(sizes)), described)


def groups_of(sizes: tuple[int, ...], *axes: int) -> tuple[tuple[int, ...], ...]:
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    rest = [axis for axis in range(len(sizes)) if axis not in axes]
    size = int(np.prod([sizes[axis] for axis in axes]))
    return tuple(map(tuple, ids.transpose(*rest, *axes).reshape(-1, size).tolist()))


@pytest.mark.parametrize(
    ("name", "sizes", "axes", "links"),
    [
        ("v4-256", (4, 4, 8), (2,), 2),  # a ring of 8, of a chip's six links
        ("v4-256", (4, 4, 8), (0, 1), 4),  # a plane of 4 x 4 rings
        ("v4-256", (4, 4, 8), (0, 1, 2), 6),
        ("v4-32", (2, 2, 4), (2,), 1),  # a row that is not wrapped: there and back
        ("v4-32", (2, 2, 4), (0, 1, 2), 3),
        ("v5p-64", (2, 4, 4), (1, 2), 2),
        ("v5p-128", (4, 4, 4), (0,), 2),
        ("v5e-8", (2, 4), (0, 1), 2),
        ("v5e-8", (2, 4), (1,), 1),
        ("v5e-64", (8, 8), (1,), 1),
        ("v5e-256", (16, 16), (1,), 2),
        ("v5e-256", (16, 16), (0, 1), 4),
        ("v6e-16", (4, 4), (0, 1), 2),
        ("v6e-128", (8, 16), (0,), 1),
        ("v6e-128", (8, 16), (1,), 2),
    ],
)
def test_axis_has_links_of_dimensions_that_it_spans(name, sizes, axes, links):
    assert torus(name, sizes).links(groups_of(sizes, *axes)) == links


def test_group_that_is_no_box_is_ring_in_order_of_its_chips():
    # Two neighbors side by side twice are a ring of four as well as a box: one link in each direction.
    square = torus("v5e-16", (4, 4))
    assert square.links(((0, 1, 5, 4),)) == 2
    # Every second chip of a row: what goes from 0 to 2 and what goes from 1 to 3 share a link.
    assert square.links(((0, 2), (1, 3))) < 1
    # A path whose ends are not neighbors goes back over other groups' links.
    path = (0, 1, 2, 3, 7, 6, 5, 9)
    assert square.links((path,)) <= 1


def collective(kind, size, groups):
    return Collective(kind, size, len(groups[0]), 10, "", "", groups)


def test_time_is_bytes_over_links_and_hops():
    described = torus("v4-256", (4, 4, 8))
    ring = groups_of((4, 4, 8), 2)
    # Two times 7/8 of the array over two links of 50 GB/s; 4 hops to the farthest chip of the ring, there and back.
    assert described.seconds(collective("all-reduce", 8e6, ring)) == pytest.approx(2 * 7e6 / 100e9 + 8 * HOP)
    assert described.seconds(collective("all-gather", 8e6, ring)) == pytest.approx(7e6 / 100e9 + 4 * HOP)


def test_permute_takes_one_link_or_shares_it():
    square = torus("v5e-16", (4, 4))
    one = square.seconds(collective("collective-permute", 5e6, ((0, 1), (1, 2))))
    assert one == pytest.approx(5e6 / 50e9 + HOP)
    assert square.seconds(collective("collective-permute", 5e6, ((0, 2), (1, 3)))) == pytest.approx(1e-4 * 2 + 2 * HOP)


def test_what_crosses_slices_takes_data_center_network():
    described = parse_topology("v5e-4")
    chips = np.array([SimpleNamespace(coords=(x, y, 0), slice_index=s) for s in (0, 1) for x in (0, 1) for y in (0, 1)])
    both = Torus.of(SimpleNamespace(devices=chips), described)
    groups = tuple((chip, chip + 4) for chip in range(4))
    assert both.seconds(collective("all-reduce", 1e6, groups)) == pytest.approx(1e6 / described.chip.network)


@pytest.mark.parametrize("name", [name for name in config_names() if named_config(name).mesh.topology])
def test_chips_that_share_weights_are_neighbors_on_torus(name, monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the extra [plan] brings it")
    for key, value in {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    config = named_config(name).mesh
    described = parse_topology(config.topology)
    mesh = decode_mesh(make_mesh(config, slice_devices(config.topology, config.slices)), config.decode_tensor)
    groups = groups_of(mesh.devices.shape, 2)
    assert Torus.of(mesh, described).links(groups) >= 2
