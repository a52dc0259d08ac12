"""The update of fine-tuning as pure functions, and `build_train_programs`, which compiles them for a mesh."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax import sharding
from isheep_jax.config import SFTConfig
from isheep_jax.model import transformer
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.model.lora import lora_table, merge_lora
from isheep_jax.sft import lora
from isheep_jax.sft.data import Batch
from isheep_jax.sft.loss import chunk_length, cross_entropy

Tree = Any


@flax.struct.dataclass
class TrainState:
    """The state that an update changes."""

    weights: Tree  # what is trained, float32: all parameters, or the adapters
    optimizer: Tree  # optax's state: Adam's two moments in the tree of `weights`, and its count of updates


@dataclass(frozen=True)
class TrainSetup:
    """The static part of an update. Learning rates and seeds are arguments, so changing them recompiles nothing."""

    architecture: Architecture
    mesh: Mesh
    method: Literal["lora", "full"]
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    weight_decay: float
    clip_norm: float
    batch_size: int  # rows, over all devices
    packing: bool  # whether several examples may share a row
    remat: transformer.Remat
    compute_dtype: str

    @classmethod
    def from_config(
        cls, architecture: Architecture, config: SFTConfig, mesh: Mesh, compute_dtype: str | jnp.dtype
    ) -> "TrainSetup":
        """Returns the setup that the settings ask for."""
        return cls(
            architecture=architecture,
            mesh=mesh,
            method=config.method,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            batch_size=config.batch_size,
            packing=config.packing,
            remat=config.remat,
            compute_dtype=jnp.dtype(compute_dtype).name,
        )

    @property
    def is_lora(self) -> bool:
        return self.method == "lora"

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def trained_table(self) -> Tree:
        """A `ParameterSpec` for each leaf of `TrainState.weights`."""
        return lora_table(self.architecture, self.lora_rank) if self.is_lora else parameter_table(self.architecture)

    @property
    def forward(self) -> transformer.ForwardSetup:
        return transformer.ForwardSetup(
            jnp.dtype(self.compute_dtype), sharding.ActivationSharding(self.mesh), self.remat
        )

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter, 2019) for a learning rate of 1, after clipping to the global norm.

        Only matrices have weight decay.
        """
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(),
            optax.add_decayed_weights(
                self.weight_decay, mask=jax.tree.map(lambda spec: spec.is_matrix, self.trained_table)
            ),
        )


def init_state(setup: TrainSetup, params: Tree, seed: jax.Array) -> TrainState:
    """Returns the state before the first update: new adapters, or the parameters in float32. seed: uint32."""
    if setup.is_lora:
        key = jax.random.fold_in(jax.random.key(seed), 0)
        weights = lora.init_lora(key, setup.architecture, setup.lora_rank)
    else:
        weights = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return TrainState(weights, setup.optimizer.init(weights))


def loss(
    setup: TrainSetup, weights: Tree, base: Tree, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of -log p over the batch's loss tokens, and their count; float32 scalars.

    Args:
        setup: static choices.
        weights: what is trained.
        base: the frozen parameters under adapters, {} when all are trained.
        batch: packed rows.
        dropout_key: two uint32; None: nothing is dropped.
    """
    params = weights
    if setup.is_lora:
        params = lora.apply_lora(
            base,
            weights,
            setup.architecture,
            scale=setup.lora_scale,
            dropout=setup.lora_dropout,
            dropout_key=dropout_key,
        )
    hidden, _ = transformer.forward(
        params,
        setup.architecture,
        batch.tokens,
        batch.positions,
        setup.forward,
        # Behind a row's only example is padding, which no token of the example sees and whose outputs carry no loss.
        segment_ids=batch.segment_ids if setup.packing else None,
    )
    rows_per_device = setup.batch_size // (setup.mesh.shape["data"] * setup.mesh.shape["fsdp"])
    return cross_entropy(
        params,
        setup.architecture,
        hidden,
        batch.targets,
        batch.loss_mask,
        chunk=chunk_length(rows_per_device),
        compute_dtype=setup.forward.compute_dtype,
        sharding=setup.forward.sharding,
    )


def train_step(
    setup: TrainSetup,
    state: TrainState,
    base: Tree,
    batch: Batch,
    learning_rate: jax.Array,
    step: jax.Array,
    seed: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update.

    Args:
        setup: static choices.
        state: before the update.
        base: the frozen parameters under adapters, {} when all are trained.
        batch: packed rows.
        learning_rate: float32 scalar.
        step: integer scalar, another one in each update.
        seed: uint32 scalar; dropout depends on it and the step.

    Returns the new state and float32 scalars: loss (mean over the loss tokens, before the update), tokens (how many
    loss tokens the batch has) and gradient_norm (before clipping).
    """
    dropout_key = None
    if setup.is_lora and setup.lora_dropout > 0:
        dropout_key = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step))

    def mean_loss(weights):
        total, count = loss(setup, weights, base, batch, dropout_key)
        return total / jnp.maximum(count, 1.0), count

    (value, count), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.weights)
    with jax.named_scope("optimizer"):
        updates, moments = setup.optimizer.update(gradients, state.optimizer, state.weights)
        weights = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)
    metrics = {"loss": value, "tokens": count, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(weights, moments), metrics


def export_params(setup: TrainSetup, base: Tree, weights: Tree) -> Tree:
    """Returns the trained parameters: adapters merged, in the dtypes of `base`."""
    return merge_lora(base, weights, setup.lora_scale) if setup.is_lora else weights


def learning_rates(peak: float, warmup_steps: int, total: int) -> np.ndarray:
    """Returns the learning rate of each update [total]: linear to `peak` over the warm-up, then a cosine to 0."""
    step = np.arange(total, dtype=np.float64)
    warm = (step + 1) / max(warmup_steps, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup_steps) / max(total - warmup_steps, 1)))
    return (peak * np.where(step < warmup_steps, warm, cosine)).astype(np.float32)


@dataclass(frozen=True)
class TrainPrograms:
    """The functions above, jitted for one `TrainSetup`, and the shardings of their arrays."""

    init_state: Callable  # (params, seed); training all weights consumes `params`, whose memory the state takes
    train_step: Callable  # (state, base, batch, learning_rate, step, seed); consumes `state`
    validation_loss: Callable  # `loss` without dropout: (weights, base, batch)
    export_params: Callable  # (base, weights)
    parameter_shardings: Tree
    state_shardings: TrainState
    batch_sharding: NamedSharding
    replicated: NamedSharding
    abstract_state: TrainState


@functools.lru_cache(maxsize=8)
def build_train_programs(setup: TrainSetup) -> TrainPrograms:
    """Returns the programs of one setup; the same ones for all iterations of a run."""
    rules = sharding.TRAIN_RULES
    parameter_shardings = sharding.param_shardings(parameter_table(setup.architecture), setup.mesh, rules)
    replicated = NamedSharding(setup.mesh, PartitionSpec())
    abstract = _abstract_state(setup)
    state = _state_shardings(setup, abstract, replicated)
    donated_params = () if setup.is_lora else 0
    return TrainPrograms(
        init_state=jax.jit(functools.partial(init_state, setup), out_shardings=state, donate_argnums=donated_params),
        train_step=jax.jit(functools.partial(train_step, setup), out_shardings=(state, replicated), donate_argnums=0),
        validation_loss=jax.jit(functools.partial(loss, setup), out_shardings=replicated),
        export_params=jax.jit(functools.partial(export_params, setup), out_shardings=parameter_shardings),
        parameter_shardings=parameter_shardings,
        state_shardings=state,
        batch_sharding=sharding.batch_sharding(setup.mesh, rules),
        replicated=replicated,
        abstract_state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state),
    )


def _abstract_state(setup: TrainSetup) -> TrainState:
    """Returns the shapes and dtypes of the state."""
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), parameter_table(setup.architecture)
    )
    return jax.eval_shape(functools.partial(init_state, setup), params, np.uint32(0))


def _state_shardings(setup: TrainSetup, abstract: TrainState, replicated: NamedSharding) -> TrainState:
    """Returns the shardings of the state: Adam's moments as the weights, its count replicated."""
    weights = sharding.param_shardings(setup.trained_table, setup.mesh, sharding.TRAIN_RULES)
    moments = optax.tree.map_params(
        setup.optimizer, lambda _, s: s, abstract.optimizer, weights, transform_non_params=lambda _: replicated
    )
    return TrainState(weights, moments)
