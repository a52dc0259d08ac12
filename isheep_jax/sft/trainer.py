"""Fine-tuning: examples and weights in, better weights out, resumable at every checkpoint."""

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

from isheep_jax import profiling, sharding, stopping
from isheep_jax.config import SFTConfig
from isheep_jax.config_checks import check_section
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.sft import data
from isheep_jax.sft.checkpoints import Checkpoints
from isheep_jax.sft.examples import Example
from isheep_jax.sft.train_step import TrainPrograms, TrainSetup, TrainState, build_train_programs, learning_rates

Tree = Any
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass
class FineTuneResult:
    """The result of a fine-tuning; losses are in nats per loss token."""

    train_loss: float
    """Mean over the updates of the last epoch, each taken before its update."""
    validation_loss: float | None
    """Loss of the returned weights; None when nothing was held out."""
    best_step: int
    """The update after which the returned weights were taken: the best validation loss, or the last."""
    steps: int
    """Updates."""
    tokens: int
    """Loss tokens over all epochs."""
    examples: int
    """Examples trained on, in each epoch."""
    validation_examples: int
    """Examples held out."""
    cut_examples: int
    """Examples, of training and validation, that lost their end to sequence_length."""
    left_out_examples: int
    """Examples left out: nothing of their response fits into sequence_length, or the chat template refuses them."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each update."""
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    """(update, validation loss) at each checkpoint."""


@dataclass
class _Progress:
    """The part of a fine-tuning's state that is not arrays; saved as JSON in each checkpoint."""

    position: dict  # state of the Grain iterator
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # loss tokens of each update
    validation_losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The earliest of the updates with the lowest validation loss; None without validation."""
        return min(self.validation_losses, key=lambda v: v[1])[0] if self.validation_losses else None


@dataclass(frozen=True)
class _Datasets:
    """Tokenized examples, and the batches made of them."""

    training: data.TokenizedExamples
    validation: data.TokenizedExamples
    batches: grain.IterDataset  # of training, over all epochs
    validation_batches: list[data.Batch]
    steps: int  # batches of training


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
    compute_dtype: str | jnp.dtype,
    on_step: OnStep | None = None,
) -> tuple[Tree | None, Tree | None, FineTuneResult]:
    """Fine-tunes `params` on the responses of `examples`.

    A call with the same arguments continues from the newest checkpoint, with the same result bit for bit.

    Args:
        params: starting weights, of any float dtype and sharding. Training all weights consumes them, so that their
            memory is free for the optimizer's state.
        architecture: the model's.
        tokenizer: renders and tokenizes the examples.
        examples: conversations with the responses to learn.
        config: settings.
        mesh: the training mesh.
        directory: where the checkpoints go.
        seed: seeds the split, the order of the examples, new adapters and dropout.
        compute_dtype: dtype of activations.
        on_step: called as on_step(step, total, metrics) after each update, with loss, learning_rate, gradient_norm,
            tokens and, where measured, validation_loss.

    Returns three values. First, the weights of the best validation loss (of the last update when nothing is held out),
    adapters merged, as the same tree, in the dtypes of `params` (all weights trained: float32) and the training rules'
    shardings; None if only the adapters are to be saved. Second, those adapters by themselves, in float32; None where
    all weights were trained. Third, what the fine-tuning did.

    Raises `UserError` for settings that do not fit each other, the mesh, the examples or the checkpoints.
    """
    check_settings(config, architecture, mesh)
    datasets = _prepare(tokenizer, examples, config, seed)
    programs = build_train_programs(TrainSetup.from_config(architecture, config, mesh, compute_dtype))
    params = jax.device_put(params, programs.parameter_shardings)
    base = params if config.method == "lora" else {}
    with Checkpoints(directory, _fingerprint(config, seed, compute_dtype, datasets)) as checkpoints:
        step_seed = sharding.put(np.uint32(seed % 2**32), programs.replicated)
        run = _Run(programs, base, datasets, config, checkpoints, on_step, step_seed)
        state, progress = run.train(params)
        best_step = progress.best_step or datasets.steps
        weights = state.weights
        del state
        if best_step != datasets.steps:
            weights = checkpoints.weights(best_step, programs.abstract_state.weights)
        tuned = programs.export_params(base, weights) if config.save == "model" else None
        checkpoints.wait()
    result = _summarize(datasets, progress, best_step, config.epochs)
    return tuned, weights if config.method == "lora" else None, result


def _prepare(tokenizer: data.ExampleEncoder, examples: Sequence[Example], config: SFTConfig, seed: int) -> _Datasets:
    training, held_out = data.split_examples(examples, config.validation_fraction, seed)
    training = data.tokenize(tokenizer, training, config.sequence_length)
    validation = data.tokenize(tokenizer, held_out, config.sequence_length)
    if not training.columns:
        raise UserError(
            training.refusal
            or f"sft.sequence_length: at {config.sequence_length} tokens nothing is left of any of {len(examples)} "
            "responses; raise it"
            if examples
            else "sft: there are no examples to learn from"
        )
    rows = {
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "packing": config.packing,
    }
    batches = data.batches(training.columns, epochs=config.epochs, shuffle_seed=seed, **rows)
    validation_batches = list(data.batches(validation.columns, **rows)) if validation.columns else []
    return _Datasets(training, validation, batches, validation_batches, data.count_batches(batches))


@dataclass(frozen=True)
class _Run:
    """The updates of one fine-tuning. All transfers between host and devices are explicit."""

    programs: TrainPrograms
    base: Tree  # the frozen parameters under adapters, {} when all are trained
    datasets: _Datasets
    config: SFTConfig
    checkpoints: Checkpoints
    on_step: OnStep | None
    seed: jax.Array  # uint32 scalar

    def train(self, params: Tree) -> tuple[TrainState, _Progress]:
        """Makes the updates that remain after the newest checkpoint. A signal makes a checkpoint, and ends them.

        params: starting weights.
        """
        with stopping.between_steps() as stop:
            return self._train(params, stop)

    def _train(self, params: Tree, stop: Any) -> tuple[TrainState, _Progress]:
        programs, steps = self.programs, self.datasets.steps
        iterator = iter(self.datasets.batches)
        done, state, progress = self._start(params, iterator)
        rates = learning_rates(self.config.learning_rate, self.config.warmup_steps, steps)
        for step in range(done + 1, steps + 1):
            # Before the first update, which is compiled, there is nothing to save.
            if step > done + 1 and stop.is_asked_for(step):
                if not self._is_checkpoint(step - 1):
                    self._save(step - 1, state, progress, iterator)
                self.checkpoints.wait()
                stop.leave()
            batch = sharding.put(next(iterator), programs.batch_sharding)
            rate = rates[step - 1]
            rate_and_step = sharding.put((rate, np.uint32(step)), programs.replicated)
            profiling.step()
            state, metrics = programs.train_step(state, self.base, batch, *rate_and_step, self.seed)
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
            progress.losses.append(metrics["loss"])
            progress.tokens.append(int(metrics["tokens"]))
            metrics["learning_rate"] = float(rate)

            is_checkpoint = self._is_checkpoint(step)
            if is_checkpoint and self.datasets.validation_batches:
                metrics["validation_loss"] = self._validation_loss(state.weights)
                progress.validation_losses.append((step, metrics["validation_loss"]))
            if not all(map(math.isfinite, metrics.values())):
                raise UserError(f"sft.learning_rate: the loss is not finite at update {step} of {steps}; lower it")
            if is_checkpoint:
                self._save(step, state, progress, iterator)
            if self.on_step is not None:
                self.on_step(step, steps, metrics)
        return state, progress

    def _is_checkpoint(self, step: int) -> bool:
        return step % self.config.checkpoint_every == 0 or step == self.datasets.steps

    def _save(self, step: int, state: TrainState, progress: _Progress, iterator: Any) -> None:
        """Starts to save the state after an update. iterator: moved past its batch."""
        progress.position = iterator.get_state()
        saved = dataclasses.asdict(progress)
        self.checkpoints.save(step, state.weights, state.optimizer, saved, progress.best_step)

    def _start(self, params: Tree, iterator: Any) -> tuple[int, TrainState, _Progress]:
        """Returns the updates already made, and the state after them. iterator: moved past their batches."""
        abstract = self.programs.abstract_state
        restored = self.checkpoints.restore(abstract.weights, abstract.optimizer)
        if restored is None:
            return 0, self.programs.init_state(params, self.seed), _Progress(iterator.get_state())
        if self.config.method == "full":
            jax.tree.map(lambda leaf: leaf.delete(), params)
        done, weights, optimizer, saved = restored
        progress = _Progress(**saved)
        progress.validation_losses = [tuple(v) for v in progress.validation_losses]
        iterator.set_state(progress.position)
        return done, TrainState(weights, optimizer), progress

    def _validation_loss(self, weights: Tree) -> float:
        """Returns nats per loss token of the held-out examples."""
        programs = self.programs
        sums = [
            programs.validation_loss(weights, self.base, sharding.put(batch, programs.batch_sharding))
            for batch in self.datasets.validation_batches
        ]
        totals, counts = zip(*jax.device_get(sums))
        return float(np.sum(totals, dtype=np.float64) / np.sum(counts, dtype=np.float64))


def _summarize(datasets: _Datasets, progress: _Progress, best_step: int, epochs: int) -> FineTuneResult:
    training, validation = datasets.training, datasets.validation
    last_epoch = slice(-max(1, round(datasets.steps / epochs)), None)
    return FineTuneResult(
        train_loss=float(np.average(progress.losses[last_epoch], weights=progress.tokens[last_epoch])),
        validation_loss=dict(progress.validation_losses).get(best_step),
        best_step=best_step,
        steps=datasets.steps,
        tokens=sum(progress.tokens),
        examples=len(training.columns),
        validation_examples=len(validation.columns),
        cut_examples=training.cut + validation.cut,
        left_out_examples=training.left_out + validation.left_out,
        losses=progress.losses,
        validation_losses=progress.validation_losses,
    )


def _fingerprint(config: SFTConfig, seed: int, compute_dtype: str | jnp.dtype, datasets: _Datasets) -> dict[str, Any]:
    """Returns everything that the course of training depends on, besides starting weights and the model's shape."""
    settings = {f"sft.{name}": value for name, value in dataclasses.asdict(config).items()}
    return {
        **settings,
        "seed": seed,
        "model.compute_dtype": jnp.dtype(compute_dtype).name,
        "training examples (sha256)": datasets.training.digest(),
        "validation examples (sha256)": datasets.validation.digest(),
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
