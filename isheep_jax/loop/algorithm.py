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

from etils import epath

from isheep_jax import distributed
from isheep_jax.config import Config
from isheep_jax.files import read_json_if_there, write_json
from isheep_jax.loop import guards, stopping
from isheep_jax.loop.card import model_card
from isheep_jax.loop.filters.novelty import Pool, RestartingPool, normalize
from isheep_jax.loop.judging import judges
from isheep_jax.loop.prompting import similar
from isheep_jax.loop.prompting.seeds import Seed, check_outputs, read_seeds
from isheep_jax.loop.prompting.templates import Templates, load
from isheep_jax.loop.prompting.topics import Guided, Topic, brainstorm, hints, read_types, wanted, wanted_topics
from isheep_jax.loop.protocols import Backend, Evaluator, Model, Reporter, StageReporter
from isheep_jax.loop.records import Instruction, Pair, Selected, Vector, kept
from isheep_jax.loop.run_directory import RunDirectory, Stage
from isheep_jax.loop.stages.assess import asked, median_mass
from isheep_jax.loop.stages.clone import thorough_answers
from isheep_jax.loop.stages.follow_up import conversation, follow_ups
from isheep_jax.loop.stages.respond import prompt_for
from isheep_jax.loop.stages.synthesize import synthesize
from isheep_jax.loop.turn import Answers, Models, once
from isheep_jax.sft.examples import Example

# What a row says of an iteration; the base model has none of it.
_FIGURES = (
    *("instructions", "kept", "mean_quality", "mean_following", "kept_quality", "kept_following", "kept_characters"),
    *("train_loss", "validation_loss", "novelty", "score_mass"),
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

    evaluators: by the name of the task. held_out: instructions of evaluation sets, never to be learned from. Rows have
    iteration, instructions, kept, mean_quality, mean_following (over all scored pairs), kept_quality, kept_following,
    kept_characters (mean length of the kept responses), train_loss, validation_loss, novelty (share of the well-formed
    instructions that were new), score_mass (median probability of the ten scores together) and evaluation
    ({task: {"accuracy", "stderr", "count"}}); with assess.agreement also agreement, with synthesize.turns=2
    second_turn ({"instructions", "kept"}), and with clone.enabled engraved (evaluation of the model that wrote the
    thorough answers) and thorough (count of these). best.json names the best iteration so far.
    Raises UserError for bad input: before anything is written where it can be known before.
    """
    templates, seeds, inputs = read_inputs(config, backend.judge)
    directory = RunDirectory.open(config, inputs, environment())
    loop = _Loop(config, backend, evaluators, held_out, reporter, templates, seeds, directory)
    rows = []
    for number in range(config.iterations + 1):
        rows.append(loop.iteration(number) if number else loop.base())
        write_json(directory.iteration(number) / "summary.json", rows[-1])
        best = stopping.best(rows, config.stop)
        if best:
            write_json(directory.path / "best.json", best)
        reporter.row(rows[-1])
        if number and number < config.iterations and stopping.finished(rows, config.stop):
            reporter.note(f"iteration {number} is the last: {config.stop.measure} has not improved (--stop.patience)")
            break
    if best:
        reporter.note(f"best: iteration {best['iteration']}, {best['measure']} {best['value']:.3f}")
    return rows


def read_inputs(config: Config, other_judge: epath.Path | None) -> tuple[Templates, list[Seed], dict[str, str]]:
    """The prompt templates, the seeds, and the sha256 of each of their files by what it is.

    other_judge: the directory of a judge that is none of the run's own models; its name stands for its files. Raises
    UserError for what is missing or malformed.
    """
    of_settings = {
        "follow_up": config.synthesize.turns == 2,
        "topics": wanted(config) > 0,
        "guided": wanted(config) > 0,
        "principles": config.respond.method == "principles",
        "thorough": config.clone.enabled,
        "retrieved": similar.is_used(config),
    }
    names = ("synthesize", *asked(config.assess).values(), *(name for name, needed in of_settings.items() if needed))
    templates = load(config.prompts, names)
    path = templates.seeds_file(config.synthesize.seeds)
    by_similarity = config.synthesize.method == "retrieved"
    seeds = read_seeds(path, 1 if by_similarity else config.synthesize.shots, config.synthesize.rules)
    if similar.is_used(config) or config.sft.seeds != "none":
        check_outputs(path, seeds)
    if similar.is_used(config):
        templates.check_retrieved()
    digests = {**templates.digests(), "seeds": hashlib.sha256(path.read_bytes()).hexdigest()}
    return templates, seeds, {**digests, **judges.identity(other_judge)}


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
        self.held_out = frozenset(normalize(text) for text in held_out)
        self.models = Models(backend)
        self.answers = Answers(config, directory, self.models, templates, reporter, self._neighbors)
        # The pool of the iteration that was asked for last.
        self._near: tuple[int, similar.Neighbors] | None = None
        self.types = read_types(templates.directory / "topics.jsonl") if wanted(config) else []

    def base(self) -> dict:
        """The base model, measured like the others."""
        evaluation = self._evaluate(0, self.directory.iteration(0), None)
        return {"iteration": 0, **dict.fromkeys(_FIGURES), "evaluation": _headline(evaluation)}

    def iteration(self, number: int) -> dict:
        """Iteration 1 and on: makes `model/` from the model before it. Returns its row."""
        instructions = self._synthesize(number)
        new = kept(instructions)
        scores, selected = self.answers.answer(number, 1, new, {})
        chosen = kept(selected)
        extra: dict = {}
        if self.config.assess.agreement:
            extra["agreement"] = self.answers.agreement(number, scores, selected)
        if self.config.synthesize.turns == 2:
            followed = kept(self._follow_ups(number, chosen))
            firsts = {s.id: s for s in chosen}
            _, second = self.answers.answer(number, 2, followed, {f.id: firsts[f.seeds[0]] for f in followed})
            extra["second_turn"] = {"instructions": len(followed), "kept": len(kept(second))}
        place = self.directory.iteration(number)
        if self.config.clone.enabled:
            self._fine_tune(number, place / "engraved", new, thorough=False)
            engraved = self._evaluate(number, place / "engraved", place / "engraved" / "model")
            extra["engraved"] = _headline(engraved)
            extra["thorough"] = len(kept(self._clone(number, new)))
        training = self._fine_tune(number, place, new, thorough=self.config.clone.enabled)
        evaluation = self._evaluate(number, place, place / "model")
        figures = (
            len(new),
            len(chosen),
            _mean(s.quality.value for s in scores if s.quality),
            _mean(s.following.value for s in scores if s.following),
            _mean(s.quality for s in chosen),
            _mean(s.following for s in chosen),
            _mean(float(len(s.response)) for s in chosen),
            training.get("train_loss"),
            training.get("validation_loss"),
            guards.novelty(instructions),
            median_mass(scores),
        )
        row = {"iteration": number, **dict(zip(_FIGURES, figures, strict=True)), **extra}
        return {**row, "evaluation": _headline(evaluation)}

    def _writer(self, number: int) -> Model:
        return self.models.get(self.directory.model(number - 1))

    def _synthesize(self, number: int) -> list[Instruction]:
        def work(stage: Stage[Instruction]) -> list[Instruction]:
            config = self.config
            by_similarity = config.synthesize.method == "retrieved"
            questions = similar.Questions(self.templates, self._neighbors(number)) if by_similarity else None
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
                    guided,
                    questions,
                )

        guided = self._guided(number)
        records, fresh = once(self.directory.stage(number, "instructions", Instruction), work)
        about, share = sum(r.hint is not None for r in kept(records)), wanted(self.config)
        if fresh and about < share:
            seeds = "the others come from seeds (reasons are in topics/ and instructions/)"
            self.reporter.warn(f"iteration {number}: {about} of {share} instructions are about topics; {seeds}")
        self.answers.guard("min_novelty", guards.novelty(records), number, fresh)
        return records

    def _pool(self, number: int) -> Pool | RestartingPool:
        """Seeds, and what the iterations before `number` kept, as far as `synthesize.novelty_scope` counts them."""
        settings = self.config.synthesize

        def seeds() -> Pool:
            pool = Pool(settings.novelty)
            for seed in self.seeds:
                pool.add(seed.id, seed.instruction, seed.input)
            return pool

        if settings.novelty_scope == "hundred":
            return RestartingPool(seeds, every=100)
        pool = seeds()
        for earlier in range(1, number) if settings.novelty_scope == "run" else ():
            for record in kept(self.directory.stage(earlier, "instructions", Instruction).records()):
                pool.add(record.id, record.instruction, record.input)
        return pool

    def _guided(self, number: int) -> Guided | None:
        """Prompts for instructions about topics, which are collected for them; None where none are wanted."""
        if not self.types:
            return None

        def work(stage: Stage[Topic]) -> list[Topic]:
            total = wanted_topics(self.config, self.types) * len(self.types)
            with self.reporter.stage(number, "topics", total, "topics") as progress:
                writer = self._writer(number)
                return brainstorm(writer, self.config, self.templates, self.types, stage, number, progress)

        topics, _ = once(self.directory.stage(number, "topics", Topic), work)
        return Guided(self.config, self.templates, self.types, hints(self.types, topics), number)

    def _neighbors(self, number: int) -> similar.Neighbors:
        """The pool of pairs that prompts of this iteration show, embedded by its writer."""
        if self._near is None or self._near[0] != number:
            earlier = range(1, number) if self.config.retrieval.pool == "seeds_and_kept" else ()
            pairs = [p for n in earlier for p in kept(self.directory.stage(n, "selected", Selected).records())]
            samples = similar.samples_of(self.seeds, pairs)

            def work(stage: Stage[Vector]) -> list[Vector]:
                with self.reporter.stage(number, "embed pool", len(samples), "pairs") as progress:
                    return similar.embed_pool(self._writer(number), samples, stage, number, progress)

            vectors, _ = once(self.directory.stage(number, "pool", Vector), work)
            self._near = (number, similar.Neighbors(self.backend, self.config, samples, vectors, number))
        return self._near[1]

    def _clone(self, number: int, instructions: Sequence[Instruction]) -> list[Pair]:
        def work(stage: Stage[Pair]) -> list[Pair]:
            with self.reporter.stage(number, "answer again", len(instructions), "answers") as progress:
                writer = self.models.get(self.directory.iteration(number) / "engraved" / "model")
                return thorough_answers(writer, self.config, self.templates, instructions, stage, number, progress)

        return once(self.directory.stage(number, "thorough", Pair), work)[0]

    def _follow_ups(self, number: int, pairs: Sequence[Selected]) -> list[Instruction]:
        def work(stage: Stage[Instruction]) -> list[Instruction]:
            with self.reporter.stage(number, "follow up", len(pairs), "pairs") as progress:
                writer, held_out = self._writer(number), self.held_out
                return follow_ups(writer, self.config, self.templates, pairs, held_out, stage, number, progress)

        return once(self.directory.stage(number, "instructions", Instruction, turn=2), work)[0]

    def _examples(self, number: int, thorough: bool) -> list[Example]:
        """What iteration `number` learns from: single turns, and second turns with the first as their context.

        thorough: the answers of the engraved model instead.
        """
        examples = []
        if self.config.sft.seeds != "none":
            examples += [Example(s.id, prompt_for(s.instruction, s.input, bare=False), s.output) for s in self.seeds]
        if self.config.sft.seeds == "alone":
            return examples
        for n in range(1 if self.config.sft.data == "all" else number, number + 1):
            if thorough:
                pairs = kept(self.directory.stage(n, "thorough", Pair).records())
                examples += [Example(p.id, prompt_for(p.instruction, p.input, bare=False), p.response) for p in pairs]
                continue
            firsts = kept(self.directory.stage(n, "selected", Selected).records())
            examples += [Example(s.id, prompt_for(s.instruction, s.input, bare=False), s.response) for s in firsts]
            if self.config.synthesize.turns == 2:
                before = {f"{s.id}.2": conversation(s) for s in firsts}
                for s in kept(self.directory.stage(n, "selected", Selected, turn=2).records()):
                    prompt = prompt_for(s.instruction, s.input, bare=False, before=before[s.instruction_id])
                    examples.append(Example(s.id, prompt, s.response))
        return examples

    def _fine_tune(self, number: int, place: epath.Path, instructions: Sequence[Instruction], thorough: bool) -> dict:
        """What the backend says of the training. thorough: learn from the answers of the engraved model.

        The model is in `place / model`, and what LoRA added in `adapter`, when `fine_tune.json` is there.
        """
        manifest = place / "fine_tune.json"
        if done := read_json_if_there(manifest):
            return done["metrics"]
        begun = time.monotonic()
        self.models.release()
        output = place / "model"
        # Of an earlier attempt, which ended before the manifest.
        distributed.from_primary(lambda: output.rmtree(missing_ok=True))
        examples = self._examples(number, thorough)
        start = self.directory.model(number - 1) if self.config.sft.start == "previous" else None
        name = "engrave" if self.config.clone.enabled and not thorough else "fine-tune"
        with self._progress(number, name, "updates") as progress:
            metrics = self.backend.fine_tune(
                start,
                examples,
                iteration=number,
                checkpoints=place / "checkpoints",
                output=output,
                adapter=place / "adapter",
                card=model_card(self.config, number, len(instructions), len(examples), thorough),
                on_step=progress,
            )
        seconds = round(time.monotonic() - begun, 3)
        digest = self.directory.digest("fine_tune")
        write_json(manifest, {"metrics": metrics, "config": digest, "seconds": seconds})
        return metrics

    def _evaluate(self, number: int, place: epath.Path, directory: epath.Path | None) -> dict:
        """The measurements of the model in `directory` (None: the base), which are kept in `place`."""
        path = place / "evaluation.json"
        if (results := read_json_if_there(path)) is not None:
            return results
        results = {}
        for name, evaluator in self.evaluators.items():
            model = self.models.get(directory)
            what = f"evaluate {name} (engraved)" if place.name == "engraved" else f"evaluate {name}"
            with self._progress(number, what, "prompts") as progress:
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
