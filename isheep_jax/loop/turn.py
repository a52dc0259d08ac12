"""One turn of an iteration's conversations: responses, scores, what else selection needs, and the selection."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from etils import epath

from isheep_jax.config import Config, is_server
from isheep_jax.decode.requests import TextLogprob
from isheep_jax.loop import guards
from isheep_jax.loop.dataset import write_dataset
from isheep_jax.loop.judging import judges
from isheep_jax.loop.judging.endpoint import Endpoint
from isheep_jax.loop.prompting.principles import Principles
from isheep_jax.loop.prompting.similar import Examples, Neighbors, choose_examples
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.protocols import Backend, Model, Reporter, StageReporter
from isheep_jax.loop.records import Instruction, Pair, Scores, Selected, Shown, Vector, kept
from isheep_jax.loop.run_directory import RunDirectory, Stage
from isheep_jax.loop.selection.rules import needs_clusters, needs_perplexities
from isheep_jax.loop.selection.select import Measures, select
from isheep_jax.loop.stages import measure
from isheep_jax.loop.stages.assess import assess, median_mass
from isheep_jax.loop.stages.follow_up import as_assessed, conversation
from isheep_jax.loop.stages.respond import is_bare, prompt_for, respond
from isheep_jax.loop.stages.synthesize import counts
from isheep_jax.text.conversation import Prompt

T = TypeVar("T")

# More unscored pairs than this share, and the scores mean little.
UNSCORED_SHARE = 0.05


class Models:
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

    def other_judge(self) -> Model:
        """The judge that is none of the run's own models."""
        return self.get(self._backend.judge)

    def release(self) -> None:
        self._model = None


def once(stage: Stage[T], work: Callable[[Stage[T]], list[T]]) -> tuple[list[T], bool]:
    """The stage's records, and whether they were made just now."""
    return (stage.records(), False) if stage.done() else (work(stage), True)


class Answers:
    """What happens to instructions, of the first turn or the second, in a run."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        models: Models,
        templates: Templates,
        reporter: Reporter,
        neighbors: Callable[[int], Neighbors],
    ):
        """neighbors: gives the pool of an iteration, for responses by similar pairs."""
        self._config, self._directory, self._models = config, directory, models
        self._neighbors = neighbors
        self._templates, self._reporter = templates, reporter
        self._principles = Principles(templates) if config.respond.method == "principles" else None

    def answer(
        self, number: int, turn: int, instructions: Sequence[Instruction], firsts: Mapping[str, Selected]
    ) -> tuple[list[Scores], list[Selected]]:
        """Responses to the (kept) instructions of iteration `number`, their scores and the selection among them.

        firsts: in the second turn, what was said before each instruction, by its id.
        """
        bare = is_bare(self._config, number)
        before = {id: conversation(first) for id, first in firsts.items()}
        prompts = {x.id: prompt_for(x.instruction, x.input, bare, before.get(x.id, ())) for x in instructions}
        pairs = self._respond(number, turn, instructions, prompts)
        whole = as_assessed(kept(pairs), firsts) if turn == 2 else kept(pairs)
        scores = self._assess(number, turn, whole)
        return scores, self._select(number, turn, pairs, scores, prompts)

    def agreement(self, number: int, scores: Sequence[Scores], pairs: Sequence[Selected]) -> dict | None:
        """How far the judge and a second one agree on some of the pairs; None where they are the same model."""
        first, second = self._config.assess.judge, judges.second_judge(self._config)
        own = [judges.own_model(self._directory, name, number) for name in (first, second) if name in judges.OWN]
        if len(own) == 2 and own[0] == own[1]:
            return None
        scored = {s.id for s in scores}
        drawn = judges.sample(self._config, number, [p for p in pairs if p.id in scored])

        def work(stage: Stage[Scores]) -> list[Scores]:
            with self._reporter.stage(number, f"assess by {second}", len(drawn), "pairs") as progress:
                return self._scores(number, second, drawn, stage, progress)

        others, _ = once(self._directory.stage(number, "agreement", Scores), work)
        return judges.agreement(scores, others, self._config.select.threshold)

    def guard(self, name: str, value: float | None, number: int, fresh: bool) -> None:
        guards.check(self._config.guard, name, value, number, fresh, self._reporter)

    def _progress(
        self, number: int, name: str, turn: int, total: int, unit: str
    ) -> contextlib.AbstractContextManager[StageReporter]:
        return self._reporter.stage(number, name if turn == 1 else f"{name} (second turn)", total, unit)

    def _judge(self, number: int, name: str) -> Model:
        settings = self._config.assess
        if is_server(name):
            at_once = settings.judge_requests
            return Endpoint(name, settings.judge_model, settings.judge_key, at_once, self._config.seed)
        if name in judges.OWN:
            return self._models.get(judges.own_model(self._directory, name, number))
        return self._models.other_judge()

    def _respond(
        self, number: int, turn: int, instructions: Sequence[Instruction], prompts: Mapping[str, Prompt]
    ) -> list[Pair]:
        def work(stage: Stage[Pair]) -> list[Pair]:
            total = len(instructions) * self._config.respond.samples
            with self._progress(number, "respond", turn, total, "responses") as progress:
                steered = self._principles or self._examples(number, instructions)
                writer = self._models.get(self._directory.model(number - 1))
                return respond(writer, self._config, instructions, prompts, stage, number, progress, steered)

        return once(self._directory.stage(number, "responses", Pair, turn), work)[0]

    def _examples(self, number: int, instructions: Sequence[Instruction]) -> Examples | None:
        """Prompts that show the pairs nearest to each instruction; None where responses need none."""
        if self._config.respond.method != "retrieved":
            return None
        neighbors = self._neighbors(number)

        def work(stage: Stage[Shown]) -> list[Shown]:
            with self._reporter.stage(number, "examples", len(instructions), "instructions") as progress:
                writer = self._models.get(self._directory.model(number - 1))
                return choose_examples(writer, neighbors, instructions, stage, progress)

        shown, _ = once(self._directory.stage(number, "examples", Shown), work)
        return Examples(self._templates, neighbors, shown)

    def _assess(self, number: int, turn: int, pairs: Sequence[Pair]) -> list[Scores]:
        def work(stage: Stage[Scores]) -> list[Scores]:
            with self._progress(number, "assess", turn, len(pairs), "pairs") as progress:
                return self._scores(number, self._config.assess.judge, pairs, stage, progress)

        scores, fresh = once(self._directory.stage(number, "scores", Scores, turn), work)
        unscored = len(scores) - len(kept(scores))
        if fresh and unscored > UNSCORED_SHARE * len(scores):
            self._reporter.warn(f"iteration {number}: {unscored} of {len(scores)} pairs got no score")
        self.guard("min_score_mass", median_mass(scores), number, fresh)
        return scores

    def _scores(
        self, number: int, name: str, pairs: Sequence[Pair], stage: Stage[Scores], progress: StageReporter
    ) -> list[Scores]:
        return assess(lambda: self._judge(number, name), self._config, self._templates, pairs, stage, number, progress)

    def _measures(self, number: int, turn: int, pairs: Sequence[Pair], prompts: Mapping[str, Prompt]) -> Measures:
        """What the rule of selection needs of the (kept) pairs beside their scores."""
        perplexities: dict[str, float | None] = {}
        clusters: dict[str, int | None] = {}
        texts = measure.instruction_texts(pairs)

        def read(stage: Stage[TextLogprob]) -> list[TextLogprob]:
            with self._progress(number, "likelihood", turn, len(pairs), "pairs") as progress:
                model = self._judge(number, self._config.assess.judge)
                return measure.likelihoods(model, pairs, prompts, stage, number, progress)

        def embed(stage: Stage[Vector]) -> list[Vector]:
            with self._progress(number, "embed", turn, len(texts), "instructions") as progress:
                model = self._judge(number, self._config.assess.judge)
                return measure.vectors(model, texts, stage, number, progress)

        if needs_perplexities(self._config):
            scores, _ = once(self._directory.stage(number, "likelihoods", TextLogprob, turn), read)
            perplexities = {s.id: measure.perplexity(s) for s in scores}
        if needs_clusters(self._config):
            vectors, _ = once(self._directory.stage(number, "vectors", Vector, turn), embed)
            purpose = f"{self._config.seed}/{number}/clusters/{turn}"
            clusters = measure.cluster(vectors, self._config.select.clusters, purpose)
        return Measures(perplexities, clusters)

    def _select(
        self,
        number: int,
        turn: int,
        pairs: Sequence[Pair],
        scores: Sequence[Scores],
        prompts: Mapping[str, Prompt],
    ) -> list[Selected]:
        def work(stage: Stage[Selected]) -> list[Selected]:
            found = self._measures(number, turn, kept(pairs), prompts)
            with self._progress(number, "select", turn, len(pairs), "pairs") as progress:
                selected = select(self._config, number, pairs, scores, found, turn)
                if turn == 1:
                    # Before anything is written, so that other settings of selection can go on from here.
                    share = len(kept(selected)) / self._config.synthesize.instructions
                    self.guard("min_yield", share, number, fresh=True)
                stage.write_part(0, selected)
                # The library makes no dataset of nothing, which a second turn may come to.
                if kept(selected):
                    write_dataset(stage.directory / "dataset", kept(selected))
                # What the paper's rule, all sampled scores above the threshold, would keep on average.
                chances = [s.above for s in selected if s.above is not None]
                reference = {"expected_above_threshold": round(sum(chances), 2)} if chances else {}
                stage.finish({**counts(selected), **reference})
                progress.advance(len(pairs), kept=len(kept(selected)))
            return selected

        return once(self._directory.stage(number, "selected", Selected, turn), work)[0]
