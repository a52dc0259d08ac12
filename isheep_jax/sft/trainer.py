"""Supervised fine-tuning: examples and weights in, better weights out, resumable at every checkpoint."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax import sharding
from isheep_jax.config import SFTConfig
from isheep_jax.config_checks import check_section
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.sft import data
from isheep_jax.sft.checkpoints import Checkpoints
from isheep_jax.sft.examples import Example
from isheep_jax.sft.train_step import Programs, StepSettings, TrainState, learning_rates, programs

Tree = Any
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass
class FineTuneResult:
    """What a fine-tuning did. JSON-able with `dataclasses.asdict`; losses are in nats per trained token."""

    train_loss: float
    """Mean over the updates of the last epoch, each taken before its update."""
    validation_loss: float | None
    """Of the returned weights; None when nothing was held out."""
    best_step: int
    """The update after which the returned weights were taken: the best validation loss, or the last."""
    steps: int
    """Updates."""
    tokens: int
    """Tokens that carried loss, over all epochs."""
    examples: int
    """Examples trained on, in each epoch."""
    validation_examples: int
    cut_examples: int
    """Examples, of training and validation, that lost their end to sequence_length."""
    left_out_examples: int
    """Examples left out because nothing of their response fits into sequence_length."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each update."""
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    """(update, validation loss) at each checkpoint."""


@dataclass
class _Progress:
    """The part of a fine-tuning's state that is not arrays; saved as JSON in each checkpoint."""

    position: dict  # state of the Grain iterator
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    validation_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The earliest of the updates with the lowest validation loss; None without validation."""
        return min(self.validation_losses, key=lambda v: v[1])[0] if self.validation_losses else None


def fine_tune(
    params: Tree,
    architecture: Architecture,
    tokenizer: data.ExampleEncoder,
    examples: Sequence[Example],
    config: SFTConfig,
    *,
    mesh: Mesh,
    directory: Path,
    seed: int,
    compute_dtype: jnp.dtype,
    on_step: OnStep | None = None,
) -> tuple[Tree, Tree | None, FineTuneResult]:
    """Fine-tune `params` on the responses of `examples`.

    params: starting weights, any float format and sharding; training all weights consumes them, so that their memory
    is free for the optimizer's state. directory: of the checkpoints; a call
    with the same arguments goes on from the newest one, with the same result bit for bit. on_step(step, total,
    metrics) is called after each update, with loss, learning_rate, gradient_norm, tokens and, where measured,
    validation_loss.

    Returns the weights of the best validation loss (of the last update when nothing is held out), adapters merged, as
    the same tree, in the number formats of `params` (all weights trained: float32) and the training rules' shardings;
    those adapters by themselves, in float32 (None where all weights were trained); and what the fine-tuning did. Raises
    `UserError` for settings that do not fit each other, the mesh, the examples or the checkpoints.
    """
    check_settings(config, architecture, mesh)
    training, held_out = data.split_examples(examples, config.validation_fraction, seed)
    training = data.tokenize(tokenizer, training, config.sequence_length)
    validation = data.tokenize(tokenizer, held_out, config.sequence_length)
    if not training.columns:
        raise UserError(
            f"sft.sequence_length: at {config.sequence_length} tokens nothing is left of any of {len(examples)} "
            "responses; raise it"
            if examples
            else "sft: there are no examples to learn from"
        )
    rows = {
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "packing": config.packing,
    }
    dataset = data.batches(training.columns, epochs=config.epochs, shuffle_seed=seed, **rows)
    total = data.count_batches(dataset)

    run = programs(architecture, _step_settings(config, compute_dtype), mesh)
    params = jax.device_put(params, run.parameter_shardings)
    base = params if config.method == "lora" else {}
    validation_batches = list(data.batches(validation.columns, **rows)) if validation.columns else []
    fingerprint = _fingerprint(config, seed, compute_dtype, training, validation)
    with Checkpoints(directory, fingerprint) as checkpoints:
        state, progress = _train(
            run, params, base, dataset, total, validation_batches, config, checkpoints, np.uint32(seed % 2**32), on_step
        )
        best_step = progress.best_step or total
        weights = state.weights
        del state
        if best_step != total:
            weights = checkpoints.weights(best_step, run.abstract_state.weights)
        tuned = run.finish(base, weights)
        checkpoints.wait()

    last_epoch = slice(-max(1, round(total / config.epochs)), None)
    result = FineTuneResult(
        train_loss=float(np.average(progress.losses[last_epoch], weights=progress.tokens[last_epoch])),
        validation_loss=dict(progress.validation_losses).get(best_step),
        best_step=best_step,
        steps=total,
        tokens=sum(progress.tokens),
        examples=len(training.columns),
        validation_examples=len(validation.columns),
        cut_examples=training.cut + validation.cut,
        left_out_examples=training.left_out + validation.left_out,
        losses=progress.losses,
        validation_losses=progress.validation_losses,
    )
    return tuned, weights if config.method == "lora" else None, result


def _train(
    run: Programs,
    params: Tree,
    base: Tree,
    dataset: grain.IterDataset,
    total: int,
    validation_batches: list[data.Batch],
    config: SFTConfig,
    checkpoints: Checkpoints,
    seed: np.uint32,
    on_step: OnStep | None,
) -> tuple[TrainState, _Progress]:
    """The updates that remain after the newest checkpoint."""
    iterator = iter(dataset)
    restored = checkpoints.restore(run.abstract_state.weights, run.abstract_state.optimizer)
    if restored is None:
        start, state, progress = 0, run.start(params, seed), _Progress(iterator.get_state())
    else:
        if config.method == "full":
            jax.tree.map(lambda leaf: leaf.delete(), params)
        start, weights, optimizer, saved = restored
        state, progress = TrainState(weights, optimizer), _Progress(**saved)
        progress.validation_losses = [tuple(v) for v in progress.validation_losses]
        iterator.set_state(progress.position)

    rates = learning_rates(config.learning_rate, config.warmup_steps, total)
    for step in range(start + 1, total + 1):
        batch = data.on_devices(next(iterator), run.batch_sharding)
        state, metrics = run.train_step(state, base, batch, rates[step - 1], np.uint32(step), seed)
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        progress.losses.append(metrics["loss"])
        progress.tokens.append(int(metrics["tokens"]))
        metrics["learning_rate"] = float(rates[step - 1])

        due = step % config.checkpoint_every == 0 or step == total
        if due and validation_batches:
            metrics["validation_loss"] = _validation_loss(run, state.weights, base, validation_batches)
            progress.validation_losses.append((step, metrics["validation_loss"]))
        if not all(map(math.isfinite, metrics.values())):
            raise UserError(f"sft.learning_rate: the loss is not finite at update {step} of {total}; lower it")
        if due or checkpoints.preemption(step):
            progress.position = iterator.get_state()
            checkpoints.save(step, state.weights, state.optimizer, dataclasses.asdict(progress), progress.best_step)
        if on_step is not None:
            on_step(step, total, metrics)
    return state, progress


def _validation_loss(run: Programs, weights: Tree, base: Tree, batches: list[data.Batch]) -> float:
    sums = [run.validation_loss(weights, base, data.on_devices(b, run.batch_sharding)) for b in batches]
    totals, counts = zip(*jax.device_get(sums))
    return float(np.sum(totals, dtype=np.float64) / np.sum(counts, dtype=np.float64))


def _step_settings(config: SFTConfig, compute_dtype: jnp.dtype) -> StepSettings:
    return StepSettings(
        method=config.method,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        batch_size=config.batch_size,
        remat=config.remat,
        compute_dtype=jnp.dtype(compute_dtype).name,
    )


def _fingerprint(
    config: SFTConfig,
    seed: int,
    compute_dtype: jnp.dtype,
    training: data.TokenizedPrompt,
    validation: data.TokenizedPrompt,
) -> dict[str, Any]:
    """Everything that the course of training depends on beside the starting weights and the model's shape."""
    settings = {f"sft.{name}": value for name, value in dataclasses.asdict(config).items()}
    return {
        **settings,
        "seed": seed,
        "model.compute_dtype": jnp.dtype(compute_dtype).name,
        "training examples (sha256)": training.digest(),
        "validation examples (sha256)": validation.digest(),
    }


def check_settings(config: SFTConfig, architecture: Architecture, mesh: Mesh) -> None:
    """Raises `UserError` for settings out of range, and for sizes that do not fit the model or the mesh."""
    check_section("sft", config)
    if config.sequence_length > architecture.context_length:
        raise UserError(
            f"sft.sequence_length: {config.sequence_length} tokens are more than the model's context of "
            f"{architecture.context_length}"
        )
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shards:
        below = config.batch_size // shards * shards
        nearest = f"{below} or {below + shards}" if below else f"{shards}"
        raise UserError(
            f"sft.batch_size: {config.batch_size} rows do not divide over mesh.data x mesh.fsdp = {shards} devices; "
            f"nearest that do: {nearest}"
        )
    sharding.check_divisible(parameter_table(architecture), mesh, sharding.TRAIN_RULES)
