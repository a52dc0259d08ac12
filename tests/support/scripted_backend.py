"""A deterministic stand-in for the JAX backend: what it writes and scores follows from request ids and prompts."""

import contextlib
import hashlib
import json
import random
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
from etils import epath

from isheep_jax.config import Config, GuardConfig, RespondConfig, SelectConfig, SynthesizeConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Embedding, TextLogprob
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.protocols import FineTuneJob
from isheep_jax.loop.run_directory import RunDirectory

VERBS = [
    "list",
    "sort",
    "explain",
    "compare",
    "invent",
    "rewrite",
    "count",
    "describe",
    "translate",
    "summarise",
    "plan",
    "correct",
    "name",
    "draft",
]
NOUNS = [
    "rivers",
    "engines",
    "poems",
    "recipes",
    "numbers",
    "birds",
    "letters",
    "planets",
    "bridges",
    "colors",
    "clocks",
    "songs",
    "islands",
    "tools",
]


def tiny_config(workdir: Path, **changes) -> Config:
    settings = {
        "workdir": str(workdir),
        "iterations": 2,
        "synthesize": SynthesizeConfig(instructions=30, shots=3, novelty=0.9),
        "respond": RespondConfig(samples=2),
        "select": SelectConfig(rule="top_fraction", fraction=0.4, buckets="sentences"),
        # The scripted model judges by chance.
        "guard": GuardConfig(judge="off"),
    }
    return Config(**{**settings, **changes})


def context_of(config, directory=None, *, templates=None, seeds=(), held_out=frozenset(), iteration=1, turn=1):
    """The context of a stage in `config.directory`; the directory needs no run."""
    templates = templates or load(config.prompts)
    directory = RunDirectory(epath.Path(directory or config.directory), config)
    return StageContext(config, templates, seeds, held_out, directory, SilentReporter(), iteration, turn)


def number(*keys: object) -> random.Random:
    return random.Random("/".join(map(str, keys)))


class Killed(Exception):
    """Stands for SIGKILL: nothing in the program may catch it."""


class Fuse:
    """Counts events and raises `Killed` at the one chosen."""

    def __init__(self, at: int | None = None):
        self.at, self.count = at, 0

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Killed(self.count)


class ScriptedModel:
    at_a_time = 12  # prompts of a stream

    def __init__(self, name: str, fuse: Fuse):
        self.name, self.fuse = name, fuse
        self.prompts: dict[str, object] = {}

    def asked(self, request, sampling) -> None:
        """Sees a request before it is answered."""
        self.prompts[request.id] = request.prompt

    def generate(self, requests, sampling):
        seen = set()
        for request in self.order(requests):
            assert request.id not in seen
            seen.add(request.id)
            self.fuse.tick()
            self.asked(request, sampling)
            yield self.complete(request)

    def order(self, requests):
        """Yields requests in an order of finishing, which is not that of the requests and differs with their set."""
        if isinstance(requests, (list, tuple)):
            yield from sorted(requests, key=lambda r: hashlib.md5(f"{len(requests)}{r.id}".encode()).digest())
            return
        waiting, ended = [], False
        while waiting or not ended:
            while not ended and len(waiting) < self.at_a_time:
                request = next(requests, self)
                ended = request is self
                if ended or request is None:
                    break
                waiting.append(request)
            assert waiting or ended, "a stream waits for results, but all of them are out"
            if waiting:
                request = min(waiting, key=lambda r: hashlib.md5(r.id.encode()).digest())
                waiting.remove(request)
                yield request

    def complete(self, request) -> Completion:
        rng = number(self.name, request.id)
        if "/topics/" in request.id:
            return Completion(request.id, "".join(f" Topic {rng.randint(0, 99)}\n-" for _ in range(9)))
        if "/synthesize/" in request.id and "Hints:" in request.prompt:
            hints = re.findall(r"\d\. (\(.*\))", request.prompt.rpartition("Hints:")[2])
            return Completion(request.id, "\n".join(f" {hint} Why is {rng.randint(0, 9**9)} so?" for hint in hints))
        if "/synthesize/" in request.id:
            task = [
                f"{rng.choice(VERBS)} {rng.randint(2, 99)} {rng.choice(NOUNS)} and {rng.choice(NOUNS)}."
                + " Be brief." * rng.randint(0, 2)
                for _ in range(4)
            ]
            text = f" {task[0]}\nInput:\n<noinput>\n" + "".join(
                f"###\n{n}. Instruction: {t}\n{n}. Input:\nabout {n}\n" for n, t in enumerate(task[1:], start=5)
            )
            return Completion(request.id, text, finish_reason=rng.choice(["stop", "length"]))
        if "/respond/" in request.id:
            return Completion(
                request.id, f" Sure, {rng.choice(NOUNS)}.", finish_reason="length" if rng.random() < 0.1 else "stop"
            )
        if "/assess/" in request.id:
            return Completion(request.id, rng.choice([" 7||fine", " 9||good", "bad"]))
        if "/follow_up/" in request.id:
            text = rng.choice(["Draw it", f" Now {rng.choice(VERBS)} it {rng.randint(2, 99)} times more."])
            return Completion(request.id, text)
        return Completion(request.id, "an answer")

    def choice_logprobs(self, requests, choices):
        assert len(choices) in (2, 10)
        for request in reversed(requests):
            self.fuse.tick()
            self.prompts[request.id] = request.prompt
            rng = number(self.name, request.id, request.prompt)
            yield ChoiceLogprobs(request.id, tuple(-1.0 - 5 * rng.random() for _ in choices))

    def text_logprobs(self, requests, texts):
        assert len(requests) == len(texts)
        for request, text in reversed(list(zip(requests, texts, strict=True))):
            self.fuse.tick()
            self.prompts[request.id] = request.prompt
            rng = number(self.name, request.id, text)
            spans = tuple(match.span() for match in re.finditer(r"\S+", text))
            logprobs = tuple(-5 * rng.random() for _ in spans)
            yield TextLogprob(request.id, sum(logprobs), len(spans), logprobs=logprobs, spans=spans)

    def embed(self, requests):
        for request in reversed(requests):
            self.fuse.tick()
            self.prompts[request.id] = request.prompt
            yield Embedding(request.id, tuple(float(request.prompt.count(letter)) for letter in "aeioustr"))


class ScriptedIndex:
    def __init__(self, vectors):
        self.vectors = vectors.astype(float)

    def nearest(self, queries, count):
        scores = queries.astype(float) @ self.vectors.T / np.linalg.norm(self.vectors, axis=1)
        return np.argsort(-scores.round(9), axis=1, kind="stable")[:, :count]


class ScriptedBackend:
    """Training "writes" the ids it learned from; a model's name is the digest of its directory.

    judge: directory of a judge that is none of the run's own models. save: as `sft.save`.
    """

    evaluation_judge = None
    decoding: ClassVar = {"chat_template": "scripted"}

    def __init__(self, fuse: Fuse | None = None, judge: Path | None = None, save: str = "model"):
        self.fuse, self.judge, self.save = fuse or Fuse(), judge, save
        self.loaded: list[Path | None] = []
        self.models: list[ScriptedModel] = []
        self.calls: list[FineTuneJob] = []
        self._held: Path | None = None

    def files(self):
        return {}

    def meter(self):
        return lambda: {"decode_steps": len(self.models)}

    def load(self, directory):
        if not self.models or self._held != directory:
            self.fuse.tick()
            self.loaded.append(directory)
            name = hashlib.sha256((directory / "weights.json").read_bytes()).hexdigest() if directory else "base"
            self.models.append(self.model(name))
            self._held = directory
        return self.models[-1]

    def model(self, name):
        return ScriptedModel(name, self.fuse)

    def index(self, vectors):
        return ScriptedIndex(vectors)

    def fine_tune(self, job, progress):
        self.calls.append(job)
        assert not job.model.exists()
        for step in range(1, 4):
            progress.update(step, 3, loss=1.0 / step)
            self.fuse.tick()
        job.checkpoints.mkdir(parents=True, exist_ok=True)
        job.adapter.mkdir(exist_ok=True)
        (job.adapter / "adapter.json").write_text(json.dumps([e.id for e in job.examples]))
        self.fuse.tick()
        learned = [str(job.start and job.start.name), [e.id for e in job.examples]]
        self._write(job.model if self.save == "model" else job.adapter, learned, job.card)
        self.fuse.tick()
        return {"train_loss": 1.0 / job.iteration, "validation_loss": None, "steps": 3}

    def write_model(self, adapter, directory, card):
        assert card == (adapter / "README.md").read_text()
        self._write(directory, json.loads((adapter / "weights.json").read_text()), card)
        self.fuse.tick()

    @staticmethod
    def _write(directory, learned, card):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights.json").write_text(json.dumps(learned))
        if directory.name == "adapter":
            (directory / "README.md").write_text(card)


class ScriptedEvaluator:
    """An `Evaluator` whose figures are `accuracy(model)`."""

    def __init__(self, accuracy, **more):
        self.accuracy, self._more = accuracy, more

    def __call__(self, model, directory, progress, earlier=None):
        with progress("", 8, "responses") as bar:
            bar.advance(4)
            bar.advance(4)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "samples.jsonl").write_text("")
        figures = {"accuracy": self.accuracy(model), "stderr": 0.1, "count": 8, "settings": {}, "scoring": {}}
        return {**figures, "examples": [name_of(model)], **self._more}

    def check_data(self):
        pass

    def is_current(self, result):
        return True


evaluator = ScriptedEvaluator(lambda model: number(name_of(model)).randint(0, 8) / 8)


def name_of(model) -> str:
    return model.backend.load(model.directory).name


class SilentStage:
    def __init__(self, log):
        self.log = log

    def advance(self, n=1, **notes):
        self.log[-1][-1] += n

    def update(self, done, total, **notes):
        self.log[-1][2], self.log[-1][-1] = total, done


class Counting:
    """An `OpenProgress` that keeps what was opened, and how many units were finished: [what, total, unit, done]."""

    def __init__(self):
        self.opened: list[list] = []

    @contextlib.contextmanager
    def __call__(self, what, total, unit):
        self.opened.append([what, total, unit, 0])
        yield self

    def advance(self, n=1, **notes):
        self.opened[-1][-1] += n

    def update(self, done, total, **notes):
        self.opened[-1][-1] = done


class SilentReporter:
    def __init__(self):
        self.stages: list[list] = []
        self.rows: list[dict] = []
        self.lines: list[str] = []

    @contextlib.contextmanager
    def stage(self, iteration, name, total, unit):
        self.stages.append([iteration, name, total, unit, 0])
        yield SilentStage(self.stages)

    def row(self, summary):
        self.rows.append(summary)

    def note(self, text):
        self.lines.append(text)

    def warn(self, text):
        self.lines.append(text)


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files of a run by relative path; the seconds in DONE and fine_tune.json are left out."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name in ("DONE", "fine_tune.json"):
                data = json.dumps({k: v for k, v in json.loads(data).items() if k not in ("seconds", "speed")}).encode()
            files[str(path.relative_to(directory))] = data
    return files
