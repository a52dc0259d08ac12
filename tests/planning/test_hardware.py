"""Names of slices, and the arguments of libtpu for them."""

import pytest

from isheep_jax.config import Config
from isheep_jax.errors import UserError
from isheep_jax.planning.hardware import TPU_CHIPS, local_chip, parse_topology, topology_arguments
from isheep_jax.planning.plan import find_hardware


@pytest.mark.parametrize(
    ("name", "chips", "shape"),
    [
        ("v4-8", 4, (2, 2, 1)),
        ("v4-256", 128, (4, 4, 8)),
        ("v5p-64", 32, (2, 4, 4)),
        ("v5e-16", 16, (4, 4)),
        ("v5litepod-16", 16, (4, 4)),
        ("v6e-8", 8, (2, 4)),
    ],
)
def test_slice_has_chips_of_its_name(name, chips, shape):
    described = parse_topology(name)
    assert (described.chips, described.shape) == (chips, shape)
    assert described.chip.name.endswith(described.generation)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v4", ["v4-256"]),
        ("v4-100", ["v4-8", "v4-256"]),
        ("v4-9", ["v4-8"]),
        ("v7-8", ["v5e-16"]),
        ("v5e-2", ["v5e-1"]),
    ],
)
def test_unknown_slice_names_known_ones(name, words):
    with pytest.raises(UserError, match=r"--mesh\.topology") as error:
        parse_topology(name)
    assert all(word in str(error.value) for word in words)


def test_only_whole_tori_are_wrapped():
    assert topology_arguments(parse_topology("v4-256"), 1)["wrap"] == (True, True, True)
    assert "wrap" not in topology_arguments(parse_topology("v4-64"), 1)
    assert "wrap" not in topology_arguments(parse_topology("v5e-64"), 1)
    assert topology_arguments(parse_topology("v5e-256"), 1)["wrap"] == (True, True, False)


def test_memory_of_hosts_is_known_for_slices_and_for_no_gpu_that_is_not_here():
    # Hosts of one, four and eight chips.
    sizes = [parse_topology(name).host_memory for name in ("v6e-1", "v6e-16", "v6e-8", "v4-256", "v5p-64", "v5e-4")]
    assert sizes == [176e9, 720e9, 1440e9, 407e9, 448e9, 192e9]
    gpu = find_hardware(Config(), gpu="H100")
    # The devices of this machine are CPUs, whose memory is the host's own.
    assert (gpu.host_memory, find_hardware(Config()).host_memory) == (0, 0)


def test_several_slices_are_asked_for_together():
    assert topology_arguments(parse_topology("v5e-16"), 2)["num_slices"] == 2


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v4", TPU_CHIPS["v4"]), ("TPU v5 lite", TPU_CHIPS["v5e"]), ("TPU v5", TPU_CHIPS["v5p"]),
     ("TPU v6 lite", TPU_CHIPS["v6e"]), ("cpu", None)],
)  # fmt: skip
def test_chips_of_this_machine_are_known_by_their_kind(kind, chip):
    assert local_chip(Device(kind)) is chip


def test_gpus_of_this_machine_are_known_by_their_kind():
    assert local_chip(Device("NVIDIA H100 80GB HBM3")).name == "NVIDIA H100"
    assert local_chip(Device("NVIDIA A100-SXM4-80GB")).name == "NVIDIA A100"
