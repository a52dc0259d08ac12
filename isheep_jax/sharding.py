"""The device mesh, and the rules that split a tensor's logical axes over the mesh axes in training and in decoding."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from isheep_jax.config import MeshConfig
from isheep_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None


class Shaped(Protocol):
    """A tensor to be split, such as a `ParameterSpec`: its sizes and a logical axis for each of them."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axis, or several, that each logical axis is split over; None: the axis is not split.

    setting: what precedes the name of a mesh axis in the user's setting of its size, such as "mesh.decode_".
    embed: the model width.
    """

    setting: str
    batch: MeshAxes
    layers: MeshAxes
    vocab: MeshAxes
    embed: MeshAxes
    heads: MeshAxes
    kv_heads: MeshAxes
    head_dim: MeshAxes
    ffn: MeshAxes
    lora_rank: MeshAxes

    def mesh_axes(self, logical: str) -> MeshAxes:
        """Returns the mesh axes that a logical axis is split over."""
        return getattr(self, logical)


# Training splits the weights and the optimizer state over fsdp, and the batch over data and fsdp.
TRAIN_RULES = ShardingRules(
    setting="mesh.",
    batch=("data", "fsdp"),
    layers=None,
    vocab="tensor",
    embed="fsdp",
    heads="tensor",
    kv_heads="tensor",
    head_dim=None,
    ffn="tensor",
    lora_rank=None,
)
# Decoding reads every weight for every token, so weights are only split over tensor and repeated over data.
DECODE_RULES = dataclasses.replace(TRAIN_RULES, setting="mesh.decode_", batch="data", embed=None)

# Names of the logical axes in error messages.
_AXIS_NAMES = {
    "vocab": "vocabulary",
    "embed": "model width",
    "heads": "query heads",
    "kv_heads": "key-value heads",
    "ffn": "feed-forward width",
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the training mesh; a size of -1 takes all remaining devices, and only `data` crosses TPU slices.

    Raises `UserError` when the product of the sizes is not the number of devices, and when fsdp or tensor would cross
    from one slice to another.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{given}: sizes are positive, and at most one may be -1 (all devices that remain)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if len(devices) % known:
            near = _nearest_divisors(known, len(devices))
            raise UserError(f"{given}: {known} does not divide the {len(devices)} devices; nearest that does: {near}")
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise UserError(
            f"{given}: the product is {known}, but there are {len(devices)} devices; set one size to -1 to use them all"
        )
    slices = count_slices(devices)
    if sizes[0] % slices:
        near = min(
            (n for n in range(slices, len(devices) + 1, slices) if len(devices) % n == 0),
            key=lambda n: abs(n - sizes[0]),
        )
        raise UserError(
            f"{given}: mesh.data={sizes[0]} is no multiple of the {slices} slices, and only data goes across slices; "
            f"nearest that works: mesh.data={near} with another size of -1"
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        within = [sizes[0] // slices, *sizes[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(
            within, [slices, 1, 1], devices=devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def count_slices(devices: Iterable[jax.Device]) -> int:
    """Returns the number of TPU slices, which only the data center network joins; 1 on platforms without slices.

    The hosts of a GPU cluster also report a slice index, but spreading fsdp over them does no harm.
    """
    # Devices of a single slice may lack a slice index.
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def decode_mesh(mesh: Mesh, decode_tensor: int) -> Mesh:
    """Returns a mesh of the same devices, in groups of `decode_tensor` that each hold a full copy of the weights.

    On a TPU slice the groups are neighbors on its torus.

    Raises `UserError` when the groups do not divide the devices, or would cross from one slice to another.
    """
    devices = mesh.devices.reshape(-1)
    if decode_tensor < 1 or len(devices) % decode_tensor:
        near = _nearest_divisors(max(decode_tensor, 1), len(devices))
        raise UserError(
            f"mesh.decode_tensor={decode_tensor} does not divide the {len(devices)} devices; nearest that does: {near}"
        )
    in_slice = len(devices) // count_slices(devices)
    if in_slice % decode_tensor:
        near = _nearest_divisors(decode_tensor, in_slice)
        raise UserError(
            f"mesh.decode_tensor={decode_tensor} does not divide the {in_slice} devices of a slice, and a copy of the "
            f"weights stays inside one; nearest that does: {near}"
        )
    sizes = (len(devices) // decode_tensor, 1, decode_tensor)
    grid = devices.reshape(sizes)
    if platform_of(mesh) == "tpu" and in_slice == len(devices):
        # In the order of the training mesh a group may be a path that winds through the slice, whose collectives have a
        # third of the links that a box of the torus has (planned for 8 of the 16 chips of a v5e-16).
        grid = mesh_utils.create_device_mesh(sizes, devices=list(devices), allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def platform_of(mesh: Mesh) -> str:
    """Returns the platform of the devices, "cpu", "gpu" or "tpu". Programs may be compiled for absent devices."""
    return mesh.devices.flat[0].platform


def partition(axes: tuple[str, ...], rules: ShardingRules) -> PartitionSpec:
    """Returns how a tensor with these logical axes is split.

    Raises `ValueError` when two of its axes would be split over the same mesh axis.
    """
    mesh_axes = [rules.mesh_axes(axis) for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"the axes {axes} collide on the mesh: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


def param_shardings(table: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Returns the `NamedSharding` of each leaf of a tree of `Shaped`, such as `parameter_table(architecture)`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, partition(spec.axes, rules)), table)


def batch_sharding(mesh: Mesh, rules: ShardingRules) -> NamedSharding:
    """Returns a sharding that splits the first axis of a batch."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Returns a tree of NumPy arrays, equal in every process, as arrays on the devices.

    The transfers are explicit, so that `jax.transfer_guard` allows them.
    """

    def put_leaf(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        # `jax.device_put` would compare the array across all processes, which takes a collective.
        parts = sharding.addressable_devices_indices_map(array.shape)
        shards = [jax.device_put(array[index], device) for device, index in parts.items()]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    return jax.device_put(tree, sharding) if sharding.is_fully_addressable else jax.tree.map(put_leaf, tree)


@dataclass(frozen=True)
class ActivationSharding:
    """Fixes the sharding of activations. A method is named by the layout it gives.

    Left to itself, XLA splits the model's width and exchanges whole activations in every layer of training: for 8
    billion parameters on 16 chips 8 times the bytes, in 3 times the memory (planned for a TPU v5e).
    """

    mesh: Mesh
    rules: ShardingRules = TRAIN_RULES

    @property
    def platform(self) -> str:
        """The platform of the devices, see `platform_of`."""
        return platform_of(self.mesh)

    @property
    def batch_shards(self) -> int:
        """Parts that the batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self._batch_axes)

    def batch_sharded(self, x: jax.Array) -> jax.Array:
        """Splits B of [B, ...] over all mesh axes of the batch, and no other axis."""
        return self._constrain(x, self.rules.batch)

    def embed_sharded(self, x: jax.Array) -> jax.Array:
        """Splits [B, T, D] along D as the weights are split, and B over the replicas of the weights."""
        return self._constrain(x, self._replica_axes, None, self.rules.embed)

    def replica_sharded(self, x: jax.Array) -> jax.Array:
        """Splits B of [B, ...] over the replicas of the weights: devices that share a replica hold the same rows."""
        return self._constrain(x, self._replica_axes)

    def vocab_sharded(self, x: jax.Array) -> jax.Array:
        """Splits logits [B, T, V] along V as `lm_head_sharded`, and B over the replicas of the weights."""
        return self._constrain(x, self._replica_axes, None, self._vocab_axes(x.shape[-1]))

    def lm_head_sharded(self, head: jax.Array, tied: bool) -> jax.Array:
        """Splits the lm_head ([V, D] if tied, otherwise [D, V]) along V over all mesh axes that split weights."""
        axes = self._vocab_axes(head.shape[0 if tied else 1])
        return self._constrain(head, *((axes, None) if tied else (None, axes)))

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return (self.rules.batch,) if isinstance(self.rules.batch, str) else self.rules.batch

    @property
    def _replica_axes(self) -> tuple[str, ...]:
        """The mesh axes of the batch along which the weights are not split."""
        return tuple(axis for axis in self._batch_axes if axis != self.rules.embed)

    def _vocab_axes(self, size: int) -> tuple[str, ...]:
        """The mesh axes that a vocabulary of this size is split over."""
        axes = tuple(axis for axis in (self.rules.embed, self.rules.vocab) if axis is not None)
        shards = math.prod(self.mesh.shape[axis] for axis in axes)
        return axes if size % shards == 0 else (self.rules.vocab,)

    def _constrain(self, x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


def one_device_sharding() -> ActivationSharding:
    """Returns the sharding of activations on the first local device alone, a mesh of one."""
    device = np.array(jax.local_devices()[:1]).reshape(1, 1, 1)
    return ActivationSharding(Mesh(device, AXES, axis_types=(AxisType.Auto,) * 3))


def check_divisible(table: Any, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises `UserError` when a size in a tree of `Shaped` does not divide over the mesh axis it is split over."""
    sizes_by_mesh_axis: dict[str, dict[str, int]] = {}
    for spec in jax.tree.leaves(table):
        for size, logical in zip(spec.shape, spec.axes):
            if (mesh_axis := rules.mesh_axes(logical)) is not None:
                sizes_by_mesh_axis.setdefault(mesh_axis, {})[logical] = size
    for axis, sizes in sizes_by_mesh_axis.items():
        for logical, size in sizes.items():
            if size % mesh.shape[axis]:
                # The advice divides everything that is split over this axis, so that the next try succeeds.
                works = _nearest_divisors(mesh.shape[axis], math.gcd(mesh.size, *sizes.values()))
                raise UserError(
                    f"{rules.setting}{axis}={mesh.shape[axis]} does not divide the model's {_AXIS_NAMES[logical]} of "
                    f"{size}; nearest that works: {works}"
                )


def _nearest_divisors(size: int, total: int) -> str:
    """Returns the divisors of `total` just below and just above `size`, as text."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    near = [*[d for d in divisors if d <= size][-1:], *[d for d in divisors if d > size][:1]]
    return " or ".join(map(str, near))
