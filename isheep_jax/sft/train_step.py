"""The compiled programs of fine-tuning. Built once per model, settings and mesh, for all iterations."""

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
from isheep_jax.model import transformer
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.sft import lora
from isheep_jax.sft.data import Batch
from isheep_jax.sft.loss import chunk_length, cross_entropy

Tree = Any


@flax.struct.dataclass
class TrainState:
    """What an update changes."""

    weights: Tree  # what is trained, float32: all parameters, or the adapters
    optimizer: Tree  # optax's state: Adam's two moments in the tree of `weights`, and its count of updates


@dataclass(frozen=True)
class StepSettings:
    """What is compiled into the programs. Learning rates and seeds are not: they are arguments."""

    method: Literal["lora", "full"]
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    weight_decay: float
    clip_norm: float
    batch_size: int
    remat: Literal["none", "full"]
    compute_dtype: str

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True)
class Programs:
    """Jitted functions, and where their arrays live.

    start(params, seed) -> TrainState. Training all weights consumes `params`, whose memory they take.
    train_step(state, base, batch, learning_rate, step, seed) -> (state, metrics): one update; `state` is donated.
        base: the frozen parameters under adapters, {} when all are trained. metrics: float32 scalars loss, tokens
        (trained tokens of the batch) and gradient_norm (before clipping).
    validation_loss(weights, base, batch) -> (sum of -log p over the trained tokens, their count)
    finish(base, weights) -> the parameters with what was learned: adapters merged, in the number formats of `base`
    """

    start: Callable
    train_step: Callable
    validation_loss: Callable
    finish: Callable
    parameter_shardings: Tree
    state_shardings: TrainState
    batch_sharding: NamedSharding
    abstract_state: TrainState


def learning_rates(peak: float, warmup_steps: int, total: int) -> np.ndarray:
    """The learning rate of each of `total` updates: linear to `peak` over the warm-up, then along a cosine to 0."""
    step = np.arange(total, dtype=np.float64)
    warm = (step + 1) / max(warmup_steps, 1)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup_steps) / max(total - warmup_steps, 1)))
    return (peak * np.where(step < warmup_steps, warm, cosine)).astype(np.float32)


def adamw(settings: StepSettings, decayed: Tree) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) for a learning rate of 1, after clipping to the global norm.

    decayed: for each leaf whether it is a matrix, which weight decay is for.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    )


@functools.lru_cache(maxsize=8)
def programs(architecture: Architecture, settings: StepSettings, mesh: Mesh) -> Programs:
    """The programs for one model, one choice of settings and one mesh."""
    base_table = parameter_table(architecture)
    is_lora = settings.method == "lora"
    table = lora.lora_table(architecture, settings.lora_rank) if is_lora else base_table
    compute_dtype = jnp.dtype(settings.compute_dtype)
    optimizer = adamw(settings, jax.tree.map(lambda s: len(s.hf_shape) == 2, table))
    row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    chunk = chunk_length(settings.batch_size // row_shards)

    parameter_shardings = sharding.param_shardings(base_table, mesh, sharding.TRAIN_RULES)
    weight_shardings = sharding.param_shardings(table, mesh, sharding.TRAIN_RULES)
    replicated = NamedSharding(mesh, PartitionSpec())
    activations = sharding.ActivationSharding(mesh)

    def initial_state(params, seed):
        if is_lora:
            weights = lora.init_lora(jax.random.fold_in(jax.random.key(seed), 0), architecture, settings.lora_rank)
        else:
            weights = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return TrainState(weights, optimizer.init(weights))

    setup = transformer.ForwardSetup(compute_dtype, activations, settings.remat)

    def loss(weights, base, batch: Batch, dropout_key):
        params = weights
        if is_lora:
            params = lora.apply_lora(
                base,
                weights,
                architecture,
                scale=settings.lora_scale,
                dropout=settings.lora_dropout,
                dropout_key=dropout_key,
            )
        hidden, _ = transformer.forward(
            params, architecture, batch.tokens, batch.positions, setup, segment_ids=batch.segment_ids
        )
        return cross_entropy(
            params,
            architecture,
            hidden,
            batch.targets,
            batch.loss_mask,
            chunk=chunk,
            compute_dtype=compute_dtype,
            sharding=activations,
        )

    def train_step(state: TrainState, base, batch: Batch, learning_rate, step, seed):
        dropout_key = None
        if is_lora and settings.lora_dropout > 0:
            dropout_key = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step))

        def mean_loss(weights):
            total, count = loss(weights, base, batch, dropout_key)
            return total / jnp.maximum(count, 1.0), count

        (value, count), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.weights)
        updates, moments = optimizer.update(gradients, state.optimizer, state.weights)
        weights = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)
        metrics = {"loss": value, "tokens": count, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(weights, moments), metrics

    def finish(base, weights):
        return lora.merge_lora(base, weights, settings.lora_scale) if is_lora else weights

    abstract = jax.eval_shape(
        initial_state, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), base_table), np.uint32(0)
    )
    state_shardings = TrainState(
        weight_shardings,
        optax.tree.map_params(
            optimizer,
            lambda _, s: s,
            abstract.optimizer,
            weight_shardings,
            transform_non_params=lambda _: replicated,
        ),
    )
    return Programs(
        start=jax.jit(initial_state, out_shardings=state_shardings, donate_argnums=() if is_lora else 0),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, replicated)),
        validation_loss=jax.jit(functools.partial(loss, dropout_key=None), out_shardings=replicated),
        finish=jax.jit(finish, out_shardings=parameter_shardings),
        parameter_shardings=parameter_shardings,
        state_shardings=state_shardings,
        batch_sharding=sharding.batch_sharding(mesh, sharding.TRAIN_RULES),
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state_shardings
        ),
    )
