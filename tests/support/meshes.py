"""Meshes of virtual CPU devices."""

import math

import jax
from jax.sharding import Mesh

from isheep_jax.config import MeshConfig
from isheep_jax.sharding import make_mesh


def mesh_of(sizes: tuple[int, int, int] = (1, 1, 1)) -> Mesh:
    """Returns a mesh of the first devices. sizes: data, fsdp and tensor."""
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
