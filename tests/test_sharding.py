"""Meshes, the two tables of rules, and the one-line errors for sizes that do not fit (8 virtual devices)."""

import dataclasses

import jax
import pytest
from architectures import small
from jax.sharding import PartitionSpec

from isheep_jax.config import MeshConfig
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import leaves, parameter_table
from isheep_jax.planning.hardware import prepare_environment, slice_devices
from isheep_jax.sharding import (
    DECODE_RULES,
    TRAIN_RULES,
    batch_sharding,
    check_divisible,
    decode_mesh,
    make_mesh,
    param_shardings,
    partition,
)

ARCHITECTURE = small(
    family="qwen2",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    layers=3,
    heads=12,
    kv_heads=4,
    head_dim=4,
    tied_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 2, 4), (1, 2, 4)),
        ((2, 4, -1), (2, 4, 1)),
    ],
)
def test_size_of_minus_one_takes_devices_that_remain(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.devices.flat) == set(jax.devices())


def test_one_device_is_mesh_like_any_other():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert tuple(mesh.shape.values()) == (1, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (2, 2, 1),
            "mesh.data=2 x mesh.fsdp=2 x mesh.tensor=1: the product is 4, but there are 8 devices; "
            "set one size to -1 to use them all",
        ),
        (
            (3, -1, 1),
            "mesh.data=3 x mesh.fsdp=-1 x mesh.tensor=1: 3 does not divide the 8 devices; nearest that does: 2 or 4",
        ),
        (
            (1, -1, 16),
            "mesh.data=1 x mesh.fsdp=-1 x mesh.tensor=16: 16 does not divide the 8 devices; nearest that does: 8",
        ),
        (
            (-1, -1, 1),
            "mesh.data=-1 x mesh.fsdp=-1 x mesh.tensor=1: sizes are positive, and at most one may be -1 "
            "(all devices that remain)",
        ),
        (
            (0, -1, 1),
            "mesh.data=0 x mesh.fsdp=-1 x mesh.tensor=1: sizes are positive, and at most one may be -1 "
            "(all devices that remain)",
        ),
    ],
)
def test_mesh_that_does_not_fit_devices_is_one_line_with_numbers(sizes, message):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*sizes))
    assert str(error.value) == message


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that decide its position in a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0


def chips(slices: int) -> list[Chip]:
    """Returns the chips of slices of 2 x 4, in an order that mixes the slices."""
    coordinates = [(x, y, 0) for y in range(4) for x in range(2)]
    mixed = [Chip(100 * s + i, s, xyz) for i, xyz in enumerate(coordinates) for s in range(slices)]
    return mixed[::-1]


def slices_of(devices) -> set[int]:
    return {device.slice_index for device in devices.flat}


@pytest.mark.parametrize(
    ("slices", "sizes"),
    [(2, (2, 8, 1)), (2, (2, -1, 4)), (2, (4, 2, -1)), (2, (-1, 1, 1)), (4, (4, 4, 2)), (3, (6, 4, 1))],
)
def test_only_data_goes_across_slices(slices, sizes):
    devices = chips(slices)
    mesh = make_mesh(MeshConfig(*sizes), devices)
    assert set(mesh.devices.flat) == set(devices)
    for replica in mesh.devices:
        assert len(slices_of(replica)) == 1
    # Slices are outermost, so that neighboring replicas mostly communicate within a slice.
    order = [replica.flat[0].slice_index for replica in mesh.devices]
    assert order == sorted(order)
    for tensor in (1, 2, 4, 8):
        for group in decode_mesh(mesh, tensor).devices:
            assert len(slices_of(group)) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (1, -1, 1),
            "mesh.data=1 x mesh.fsdp=-1 x mesh.tensor=1: mesh.data=1 is no multiple of the 4 slices, and only data "
            "goes across slices; nearest that works: mesh.data=4 with another size of -1",
        ),
        (
            (-1, 2, 8),
            "mesh.data=-1 x mesh.fsdp=2 x mesh.tensor=8: mesh.data=2 is no multiple of the 4 slices, and only data "
            "goes across slices; nearest that works: mesh.data=4 with another size of -1",
        ),
    ],
)
def test_data_that_does_not_fill_slices_names_nearest_that_does(sizes, message):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*sizes), chips(4))
    assert str(error.value) == message
    assert make_mesh(MeshConfig(4, -1, 1), chips(4)).shape["fsdp"] == 8


def test_copy_of_weights_that_would_cross_slices_names_nearest_that_does_not():
    with pytest.raises(UserError) as error:
        decode_mesh(make_mesh(MeshConfig(2, 8, 1), chips(2)), 16)
    assert str(error.value) == (
        "mesh.decode_tensor=16 does not divide the 8 devices of a slice, and a copy of the weights stays inside one; "
        "nearest that does: 8"
    )


def test_hosts_of_gpu_cluster_are_not_slices():
    devices = [dataclasses.replace(chip, platform="gpu", device_kind="NVIDIA H100") for chip in chips(2)]
    assert make_mesh(MeshConfig(1, -1, 1), devices).shape["fsdp"] == 16


@pytest.mark.tpu_compile
def test_described_slices_are_laid_out_like_slices():
    prepare_environment("v4-64")
    mesh = make_mesh(MeshConfig(2, -1, 4), slice_devices("v4-64", 2))
    assert tuple(mesh.shape.values()) == (2, 8, 4)
    assert [slices_of(replica) for replica in mesh.devices] == [{0}, {1}]
    assert make_mesh(MeshConfig(), slice_devices("v4-64", 1)).shape["fsdp"] == 32


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_decode_mesh_has_same_devices_in_same_order(tensor):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    decoding = decode_mesh(mesh, tensor)
    assert tuple(decoding.shape.values()) == (8 // tensor, 1, tensor)
    assert decoding.devices.ravel().tolist() == mesh.devices.ravel().tolist()


@pytest.mark.parametrize(("tensor", "nearest"), [(3, "2 or 4"), (16, "8"), (0, "1 or 2"), (-1, "1 or 2")])
def test_decode_mesh_that_does_not_divide_names_nearest(tensor, nearest):
    with pytest.raises(UserError) as error:
        decode_mesh(make_mesh(MeshConfig()), tensor)
    assert (
        str(error.value) == f"mesh.decode_tensor={tensor} does not divide the 8 devices; nearest that does: {nearest}"
    )


@pytest.mark.parametrize("rules", [TRAIN_RULES, DECODE_RULES], ids=["train", "decode"])
def test_every_leaf_has_sharding_whose_parts_are_equal(rules):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    table = parameter_table(ARCHITECTURE)
    shardings = param_shardings(table, mesh, rules)
    assert jax.tree.structure(shardings) == jax.tree.structure(table)
    for spec, sharding in zip(jax.tree.leaves(table), jax.tree.leaves(shardings)):
        assert len(sharding.spec) == len(spec.shape)
        sharding.shard_shape(spec.shape)  # raises where a size does not divide


def test_training_splits_every_matrix_over_fsdp_and_decoding_none():
    for _, spec in leaves(parameter_table(ARCHITECTURE)):
        assert ("fsdp" in partition(spec.axes, TRAIN_RULES)) == ("embed" in spec.axes)
        assert "fsdp" not in partition(spec.axes, DECODE_RULES)
        assert "data" not in (*partition(spec.axes, TRAIN_RULES), *partition(spec.axes, DECODE_RULES))


def test_rows_of_batch_go_to_different_devices():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert batch_sharding(mesh, TRAIN_RULES).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(mesh, TRAIN_RULES).shard_shape((8, 5)) == (2, 5)
    decoding = decode_mesh(mesh, 2)
    assert batch_sharding(decoding, DECODE_RULES).shard_shape((8, 5)) == (2, 5)


def test_two_axes_of_leaf_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"\('vocab', 'ffn'\) collide on the mesh"):
        partition(("vocab", "ffn"), TRAIN_RULES)


def test_misspelled_axis_is_refused():
    with pytest.raises(AttributeError, match="head_dims"):
        partition(("heads", "head_dims"), TRAIN_RULES)
    with pytest.raises(TypeError, match="head_dims"):
        dataclasses.replace(TRAIN_RULES, head_dims="tensor")


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2), (2, 1, 4)])
def test_sizes_that_divide_are_accepted(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    check_divisible(parameter_table(ARCHITECTURE), mesh, TRAIN_RULES)
    check_divisible(parameter_table(ARCHITECTURE), decode_mesh(mesh, 4), DECODE_RULES)


@pytest.mark.parametrize(
    ("changed", "sizes", "rules", "message"),
    [
        # 8 divides the vocabulary and the feed-forward width, and 4 is the largest that divides every size.
        (
            {},
            (1, 1, 8),
            TRAIN_RULES,
            "mesh.tensor=8 does not divide the model's key-value heads of 4; nearest that works: 4",
        ),
        (
            {"hidden_size": 44},
            (1, 8, 1),
            TRAIN_RULES,
            "mesh.fsdp=8 does not divide the model's model width of 44; nearest that works: 4",
        ),
        (
            {"vocab_size": 97},
            (1, 4, 2),
            TRAIN_RULES,
            "mesh.tensor=2 does not divide the model's vocabulary of 97; nearest that works: 1",
        ),
        (
            {"intermediate_size": 66},
            (2, 1, 4),
            DECODE_RULES,
            "mesh.decode_tensor=4 does not divide the model's feed-forward width of 66; nearest that works: 2",
        ),
    ],
)
def test_sizes_that_do_not_divide_name_setting_numbers_and_what_works(changed, sizes, rules, message):
    architecture = dataclasses.replace(ARCHITECTURE, **changed)
    with pytest.raises(UserError) as error:
        check_divisible(parameter_table(architecture), make_mesh(MeshConfig(*sizes)), rules)
    assert str(error.value) == message
    works = int(message.rsplit(" ", 1)[1])
    check_divisible(parameter_table(architecture), decode_mesh(make_mesh(MeshConfig()), works), DECODE_RULES)


def test_message_names_setting_of_rules_that_were_given():
    # A copy of the rules gives the same message.
    mesh = decode_mesh(make_mesh(MeshConfig()), 8)
    for rules, setting in ((TRAIN_RULES, "mesh.tensor=8"), (DECODE_RULES, "mesh.decode_tensor=8")):
        with pytest.raises(UserError, match=f"^{setting} "):
            check_divisible(parameter_table(ARCHITECTURE), mesh, dataclasses.replace(rules))
