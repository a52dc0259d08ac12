"""One iteration, stage after stage, and the loop over iterations (I-SHEEP, Algorithm 1).

Every stage leaves its results in the run directory and is skipped when they are there, so the same call resumes.
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from etils import epath

from isheep_jax import processes
from isheep_jax.config import Config
from isheep_jax.loop.assess import assess
from isheep_jax.loop.card import model_card
from isheep_jax.loop.dataset import write_dataset
from isheep_jax.loop.novelty import Pool, normalise
from isheep_jax.loop.protocols import Backend, Evaluator, Model, Reporter, StageReporter
from isheep_jax.loop.records import Instruction, Pair, Scores, Selected, kept, user_text
from isheep_jax.loop.respond import respond
from isheep_jax.loop.run_directory import RunDirectory, Stage, result, write_json
from isheep_jax.loop.seeds import Seed, read_seeds
from isheep_jax.loop.select import select
from isheep_jax.loop.synthesize import counts, synthesize
from isheep_jax.loop.templates import Templates, load
from isheep_jax.model.conversation import Message
from isheep_jax.sft.examples import Example

T = TypeVar("T")

# More unscored pairs than this, or less median probability on the ten scores, and the scores mean little.
UNSCORED_SHARE = 0.05
LOW_MASS = 0.5
# Fewer kept than this share of the instructions: the model learns from next to nothing.
LOW_YIELD = 0.02

# What a row says of an iteration; the base model has none of it.
_FIGURES = (
    *("instructions", "kept", "mean_quality", "mean_following", "kept_quality", "kept_following", "kept_characters"),
    *("train_loss", "validation_loss"),
)
_PACKAGES = (
    "isheep_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tensorflow-datasets",
)


def run(
    config: Config,
    backend: Backend,
    evaluators: dict[str, Evaluator],
    held_out: frozenset[str],
    reporter: Reporter,
) -> list[dict]:
    """Runs, or goes on with, all iterations; returns one row for the base model (iteration 0) and one per iteration.

    evaluators: benchmarks by name. held_out: instructions of evaluation sets, never to be learned from. Rows have
    iteration, instructions, kept, mean_quality, mean_following (over all scored pairs), kept_quality, kept_following,
    kept_characters (mean length of the kept responses), train_loss, validation_loss and evaluation
    ({benchmark: {"accuracy", "stderr", "count"}}).
    Raises UserError for bad input: before anything is written where it can be known before.
    """
    templates, seeds, inputs = read_inputs(config)
    directory = RunDirectory.open(config, inputs, environment())
    loop = _Loop(config, backend, evaluators, held_out, reporter, templates, seeds, directory)
    rows = []
    for number in range(config.iterations + 1):
        rows.append(loop.iteration(number) if number else loop.base())
        write_json(directory.iteration(number) / "summary.json", rows[-1])
        reporter.row(rows[-1])
    return rows


def read_inputs(config: Config) -> tuple[Templates, list[Seed], dict[str, str]]:
    """The prompt templates, the seeds, and the sha256 of each of their files by what it is.

    Raises UserError for what is missing or malformed.
    """
    templates = load(config.prompts)
    path = templates.seeds if config.synthesize.seeds == "builtin" else Path(config.synthesize.seeds)
    seeds = read_seeds(path, config.synthesize.shots, config.synthesize.rules)
    return templates, seeds, {**templates.digests(), "seeds": hashlib.sha256(path.read_bytes()).hexdigest()}


class _Models:
    """At most one model at a time: weights of two may not fit."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._directory: epath.Path | None = None
        self._model: Model | None = None

    def get(self, directory: epath.Path | None) -> Model:
        if self._model is None or self._directory != directory:
            self.release()
            self._model, self._directory = self._backend.load(directory), directory
        return self._model

    def release(self) -> None:
        self._model = None


class _Loop:
    def __init__(
        self,
        config: Config,
        backend: Backend,
        evaluators: dict[str, Evaluator],
        held_out: frozenset[str],
        reporter: Reporter,
        templates: Templates,
        seeds: Sequence[Seed],
        directory: RunDirectory,
    ):
        self.config, self.backend, self.evaluators, self.reporter = config, backend, evaluators, reporter
        self.templates, self.seeds, self.directory = templates, seeds, directory
        self.held_out = frozenset(normalise(text) for text in held_out)
        self.models = _Models(backend)

    def base(self) -> dict:
        """The base model, measured like the others."""
        evaluation = self._evaluate(0)
        return {"iteration": 0, **dict.fromkeys(_FIGURES), "evaluation": _headline(evaluation)}

    def iteration(self, number: int) -> dict:
        """Iteration 1 and on: makes `model/` from the model before it. Returns its row."""
        instructions = self._synthesize(number)
        pairs = self._respond(number, kept(instructions))
        scores = self._assess(number, kept(pairs))
        selected = self._select(number, pairs, scores)
        training = self._fine_tune(number, selected, len(kept(instructions)))
        evaluation = self._evaluate(number)
        chosen = kept(selected)
        figures = (
            len(kept(instructions)),
            len(chosen),
            _mean(s.quality.value for s in scores),
            _mean(s.following.value for s in scores),
            _mean(s.quality for s in chosen),
            _mean(s.following for s in chosen),
            _mean(float(len(s.response)) for s in chosen),
            training.get("train_loss"),
            training.get("validation_loss"),
        )
        return {"iteration": number, **dict(zip(_FIGURES, figures, strict=True)), "evaluation": _headline(evaluation)}

    def _writer(self, number: int) -> Model:
        return self.models.get(self.directory.model(number - 1))

    def _synthesize(self, number: int) -> list[Instruction]:
        def work(stage: Stage[Instruction]) -> list[Instruction]:
            config = self.config
            with self.reporter.stage(number, "synthesize", config.synthesize.instructions, "instructions") as progress:
                return synthesize(
                    self._writer(number),
                    config,
                    self.templates,
                    self.seeds,
                    self._pool(number),
                    self.held_out,
                    stage,
                    number,
                    progress,
                )

        return _once(self.directory.stage(number, "instructions", Instruction), work)

    def _pool(self, number: int) -> Pool:
        """Seeds, and what the iterations before `number` kept."""
        pool = Pool(self.config.synthesize.novelty)
        for seed in self.seeds:
            pool.add(seed.id, seed.instruction, seed.input)
        for earlier in range(1, number):
            for record in kept(self.directory.stage(earlier, "instructions", Instruction).records()):
                pool.add(record.id, record.instruction, record.input)
        return pool

    def _respond(self, number: int, instructions: Sequence[Instruction]) -> list[Pair]:
        def work(stage: Stage[Pair]) -> list[Pair]:
            total = len(instructions) * self.config.respond.samples
            with self.reporter.stage(number, "respond", total, "responses") as progress:
                return respond(self._writer(number), self.config, instructions, stage, number, progress)

        return _once(self.directory.stage(number, "responses", Pair), work)

    def _assess(self, number: int, pairs: Sequence[Pair]) -> list[Scores]:
        def work(stage: Stage[Scores]) -> list[Scores]:
            judge = self.directory.model(number - 1) if self.config.assess.judge == "current" else None
            with self.reporter.stage(number, "assess", len(pairs), "pairs") as progress:
                scores = assess(self.models.get(judge), self.config, self.templates, pairs, stage, number, progress)
            self._warn_about_scores(number, scores)
            return scores

        return _once(self.directory.stage(number, "scores", Scores), work)

    def _warn_about_scores(self, number: int, scores: Sequence[Scores]) -> None:
        unscored = len(scores) - len(kept(scores))
        if unscored > UNSCORED_SHARE * len(scores):
            self.reporter.warn(f"iteration {number}: {unscored} of {len(scores)} pairs got no score")
        masses = sorted(m for s in scores for m in (s.quality.mass, s.following.mass) if m is not None)
        if masses and masses[len(masses) // 2] < LOW_MASS:
            self.reporter.warn(
                f"iteration {number}: the model gives the ten scores a median probability of only "
                f"{masses[len(masses) // 2]:.2f}; the scoring prompts may not suit it"
            )

    def _select(self, number: int, pairs: Sequence[Pair], scores: Sequence[Scores]) -> list[Selected]:
        def work(stage: Stage[Selected]) -> list[Selected]:
            with self.reporter.stage(number, "select", len(pairs), "pairs") as progress:
                selected = select(self.config, number, pairs, scores)
                stage.write_part(0, selected)
                write_dataset(stage.directory / "dataset", kept(selected))
                # What the paper's rule, both sampled scores above the threshold, would keep on average.
                chances = [s.above for s in selected if s.above is not None]
                reference = {"expected_above_threshold": round(sum(chances), 2)} if chances else {}
                stage.finish({**counts(selected), **reference})
                progress.advance(len(pairs), kept=len(kept(selected)))
            if len(kept(selected)) < LOW_YIELD * self.config.synthesize.instructions:
                self.reporter.warn(
                    f"iteration {number}: only {len(kept(selected))} pairs are kept; lower select.threshold or use "
                    "select.rule=top_fraction for more"
                )
            return selected

        return _once(self.directory.stage(number, "selected", Selected), work)

    def _fine_tune(self, number: int, selected: Sequence[Selected], instructions: int) -> dict:
        """What the backend says of the training.

        The model is in `model/`, and what LoRA added in `adapter/`, when `fine_tune.json` is there.
        """
        place = self.directory.iteration(number)
        manifest = place / "fine_tune.json"
        if done := result(manifest):
            return done["metrics"]
        begun = time.monotonic()
        self.models.release()
        output = place / "model"
        # Of an earlier attempt, which ended before the manifest.
        processes.from_first(lambda: output.rmtree(missing_ok=True))
        examples = [
            Example(s.id, (Message("user", user_text(s.instruction, s.input)),), s.response) for s in kept(selected)
        ]
        start = self.directory.model(number - 1) if self.config.sft.start == "previous" else None
        with self._progress(number, "fine-tune", "updates") as progress:
            metrics = self.backend.fine_tune(
                start,
                examples,
                iteration=number,
                checkpoints=place / "checkpoints",
                output=output,
                adapter=place / "adapter",
                card=model_card(self.config, number, instructions, len(examples)),
                on_step=progress,
            )
        seconds = round(time.monotonic() - begun, 3)
        digest = self.directory.digest("fine_tune")
        write_json(manifest, {"metrics": metrics, "config": digest, "seconds": seconds})
        return metrics

    def _evaluate(self, number: int) -> dict:
        path = self.directory.iteration(number) / "evaluation.json"
        if (results := result(path)) is not None:
            return results
        results = {}
        for name, evaluator in self.evaluators.items():
            model = self.models.get(self.directory.model(number))
            with self._progress(number, f"evaluate {name}", "prompts") as progress:
                results[name] = evaluator(model, progress)
        write_json(path, results)
        return results

    @contextlib.contextmanager
    def _progress(self, number: int, name: str, unit: str) -> Iterator[Callable[..., None]]:
        """progress(done, total, notes) for work whose total is known only when it first reports."""
        with contextlib.ExitStack() as stack:
            opened: list[StageReporter] = []
            reported = 0

            def progress(done: int, total: int, notes: dict | None = None) -> None:
                nonlocal reported
                if not opened:
                    opened.append(stack.enter_context(self.reporter.stage(number, name, total, unit)))
                opened[0].advance(done - reported, **(notes or {}))
                reported = done

            yield progress


def _once(stage: Stage[T], work: Callable[[Stage[T]], list[T]]) -> list[T]:
    return stage.records() if stage.done() else work(stage)


def _headline(evaluation: dict) -> dict:
    return {
        name: {key: result[key] for key in ("accuracy", "stderr", "count") if key in result}
        for name, result in evaluation.items()
    }


def _mean(values: Iterator[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 4) if known else None


def environment() -> dict:
    """Versions of what the results depend on beside the settings."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": versions}
