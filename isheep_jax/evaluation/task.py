"""The parts of an evaluation task: samples in, responses of a model, scores of the responses, figures out.

A task is data and pure functions: `runner.py` asks the model, keeps every response and resumes; `figures.py` turns
scores into means with standard errors. A task may give the responses itself, to measure how probable they are to the
model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from etils import epath

from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.evaluation.figures import Figure
from isheep_jax.loop.protocols import Model, OpenProgress
from isheep_jax.text.conversation import Prompt

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Sample:
    """One item of a task.

    id: unique within the task; with the attempt and the run's seed it decides the random numbers of a response.
    prompt: conversation, or text to continue, of the first turn.
    sampling: how it is answered.
    given: a response that the model does not write: it tells the log-probabilities of its tokens. None: it writes one.
    reference: what the scorer needs, as JSON values: right answers, tests, constraints.
    later_turns: what the user says after each response; only after conversations.
    attempts: independent responses.
    groups: {"category": "writing"}: the main figure is also given for each group of samples, and the examples in the
        result are the first sample of each value of the first group.
    held_out: texts that no run evaluated on the task may train on.
    """

    id: str
    prompt: Prompt
    sampling: SamplingParams = _GREEDY
    given: str | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    later_turns: tuple[str, ...] = ()
    attempts: int = 1
    groups: Mapping[str, str] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """What a model answered to one attempt at a sample; with its scores a line of `evaluation/TASK/samples.jsonl`.

    sample: its id.
    prompts: prompt of each turn as the user wrote it: the text, or the user's last message.
    texts, finish_reasons: of each turn, as `Completion` has them.
    error: why the prompt could not be answered ("": it could); then the texts are empty.
    logprobs: natural-log probability of each token of a response that was given; empty for one that the model wrote.
    """

    sample: str
    attempt: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    error: str = ""
    logprobs: tuple[float, ...] = ()

    def __post_init__(self):
        if not len(self.prompts) == len(self.texts) == len(self.finish_reasons) > 0:
            raise ValueError("a response needs a prompt, a text and a finish reason for each turn")

    @property
    def text(self) -> str:
        """The response of the first turn."""
        return self.texts[0]


@dataclass(frozen=True)
class Score:
    """The scores of one response.

    values: by name; true or false counts as 1 or 0. Several values (one per instruction of a prompt) each count as a
        unit of the mean, and their standard error is clustered by sample. A name that is missing does not count.
    details: JSON values for the reader, such as why a program failed.
    """

    values: Mapping[str, float | Sequence[float]]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeModel:
    """A model of this machine that judges.

    load: loads it; the evaluated model is released by then. digest: sha256 of its files.
    """

    load: Callable[[], Model]
    digest: str


@dataclass(frozen=True)
class Scoring:
    """What a scorer may use besides the responses.

    settings: of the evaluation.
    directory: the task's directory, where costly verdicts may be kept so that a killed scorer goes on.
    progress: opens a progress bar: `with progress("judge", total, "answers") as bar: bar.advance()`.
    judge: the model that `settings.judge` names, if it is a model and not a server.
    """

    settings: EvaluateConfig
    directory: epath.Path
    progress: OpenProgress
    judge: JudgeModel | None = None

    @property
    def model_name(self) -> str:
        """The evaluated model in files for other programs: RUN-iteration_N, or the name of the output directory."""
        parts = self.directory.parent.parent.parts
        iterations = [i for i, part in enumerate(parts) if part.startswith("iteration_")]
        return "-".join(parts[max(iterations[-1] - 1, 0) :] if iterations else parts[-1:]) or "model"


@dataclass(frozen=True)
class TaskOptions:
    """What a task's samples depend on.

    settings: of the evaluation.
    chat: whether the model holds conversations; otherwise prompts are texts to continue.
    """

    settings: EvaluateConfig
    chat: bool = True


Measures = Literal["accuracy", "loss", ""]

# Scores the responses of a task, in their order: pairs of a sample and one response to it.
Scorer = Callable[[Sequence[tuple[Sample, Response]], Scoring], Sequence[Score]]


@dataclass(frozen=True)
class Task:
    """A row of `tasks.TASKS`.

    title: name of the benchmark, as published.
    version: raised when a change of prompts or scoring changes figures.
    samples: returns all samples in a fixed order. Raises UserError where the data is missing or damaged.
    score: scores the responses.
    main: name of the figure that stands for the task.
    shown: further figures for tables.
    measures: what the main figure is. "accuracy": a share (0 to 1) of what was right, which may choose the best
        iteration. "loss": lower is better. "": anything else.
    figures: further figures that are not means of scores, from (sample, response, score) of every response, such as
        pass@k.
    held_out_texts: returns the texts that no run evaluated on the task may train on; None: `held_out` of the samples.
    random_order: whether the order of the samples is random already; then a limit takes the first ones. Otherwise it
        takes those whose ids have the lowest hashes.
    scoring_settings: settings of `EvaluateConfig` that scores depend on, but not responses; when they change, the kept
        responses are scored again.
    check: raises UserError for settings that do not suit the task, before anything is read or computed.
    """

    title: str
    version: int
    samples: Callable[[TaskOptions], list[Sample]]
    score: Scorer
    main: str
    shown: tuple[str, ...] = ()
    measures: Measures = "accuracy"
    figures: Callable[[Sequence[tuple[Sample, Response, Score]]], dict[str, Figure]] | None = None
    held_out_texts: Callable[[], frozenset[str]] | None = None
    random_order: bool = False
    scoring_settings: tuple[str, ...] = ()
    check: Callable[[EvaluateConfig], None] = lambda settings: None
