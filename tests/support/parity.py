"""The committed models of `make_fixtures.py`, as arrays."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from meshes import mesh_of
from safetensors.numpy import load_file

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.model import transformer
from isheep_jax.model.architecture import Architecture, leaves, parameter_table
from isheep_jax.sharding import TRAIN_RULES

FIXTURES = Path(__file__).parents[1] / "model" / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir())


def load(directory: Path, dtype=jnp.float32, mesh=None, rules=TRAIN_RULES):
    """(architecture, params) of a Hugging Face directory, on one device unless a mesh is given."""
    architecture = read_architecture(directory)
    return architecture, load_parameters(directory, architecture, mesh=mesh or mesh_of(), rules=rules, dtype=dtype)


def largest(values) -> float:
    return float(np.abs(values).max())


def expected(name: str) -> dict[str, np.ndarray]:
    return load_file(FIXTURES / name / "expected.safetensors")


def plain_positions(tokens) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@partial(jax.jit, static_argnames=("architecture", "compute_dtype", "remat"))
def forward(
    params, architecture: Architecture, tokens, positions, *, compute_dtype=jnp.float32, remat="none", **options
):
    """`transformer.forward`, compiled."""
    setup = transformer.ForwardSetup(compute_dtype, remat=remat)
    return transformer.forward(params, architecture, tokens, positions, setup, **options)


@partial(jax.jit, static_argnums=(1, 3))
def plain_logits(params, architecture: Architecture, tokens, compute_dtype=jnp.float32) -> jax.Array:
    """[B, T, V] of whole rows without padding."""
    hidden, _ = forward(params, architecture, tokens, plain_positions(tokens), compute_dtype=compute_dtype)
    return transformer.logits(params, architecture, hidden, compute_dtype)


def mean_loss(params, architecture: Architecture, tokens, labels) -> jax.Array:
    """Next-token cross-entropy over the labels that are not -100, as Hugging Face computes it."""
    logprobs = jax.nn.log_softmax(plain_logits(params, architecture, tokens)[:, :-1])
    targets = labels[:, 1:]
    picked = jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets >= 0, picked, 0)) / jnp.sum(targets >= 0)


def by_huggingface_name(tree, architecture: Architecture) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters as Hugging Face tensors: names, shapes and orientation from the table."""
    tensors = {}
    for path, spec in leaves(parameter_table(architecture)):
        leaf = tree
        for key in path:
            leaf = leaf[key]
        for layer in range(spec.shape[0] if spec.stacked else 1):
            value = np.asarray(leaf[layer] if spec.stacked else leaf)
            if spec.transposed:
                value = value.reshape(math.prod(spec.hf_shape[1:]), spec.hf_shape[0]).T
            tensors[spec.hf_name.format(layer=layer)] = value.reshape(spec.hf_shape)
    return tensors
