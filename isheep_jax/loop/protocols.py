"""What the loop needs from the rest of the program, as protocols: so that its tests run on a scripted model."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from etils import epath

from isheep_jax.decode.requests import (
    ChoiceLogprobs,
    Completion,
    Embedding,
    Request,
    SamplingParams,
    TextLogprob,
    TokenIds,
)
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.sft.examples import Example
from isheep_jax.text.conversation import Conversation


class Model(Protocol):
    """A language model that writes and scores text.

    The answer to a request depends only on the model, the request, the sampling and the run's seed: not on the other
    requests, their order or a restart.
    """

    def generate(
        self, requests: Iterable[Request | None], sampling: SamplingParams
    ) -> Generator[Completion, None, None]:
        """Yields one completion per request, in the order in which they finish; match them by id.

        A writer also takes a stream: an iterator of requests, which it asks for as it can work on them, and in which
        None says that there are none before more completions have come out. Who has enough closes the generator.
        """

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        """Yields the natural-log probability of each choice as the continuation of each prompt; match them by id."""

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str | TokenIds]) -> Iterator[TextLogprob]:
        """Yields the natural-log probability of each text after the prompt with the same index; match them by id.

        After a conversation the text is the response as the chat template writes it, its end of turn left out; a
        response has no white space around it, but a template may put some.
        """

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        """Yields the mean of the last layer's hidden states over each prompt's tokens; match them by id."""


class Tokenizer(Protocol):
    """What callers that tokenize themselves need of `isheep_jax.text.tokenizer.Tokenizer`.

    start_id: the token that a text without a prompt is scored after.
    """

    bos_id: int | None
    eos_ids: Sequence[int]
    start_id: int | None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Returns the ids of a text, after the beginning-of-text token that the model expects unless bos is False."""

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of ids including the names of special tokens."""

    def render(self, conversation: Conversation) -> str:
        """Returns the text of a conversation up to the assistant's header. Raises `UserError` where it is refused."""


class TokenModel(Model, Protocol):
    """A model for callers that tokenize themselves, and keep answers by its weights.

    max_length: most tokens of a prompt with what follows it.
    """

    tokenizer: Tokenizer
    max_length: int

    def weights_digest(self) -> str:
        """Returns the sha256 of the weights."""


class Index(Protocol):
    """A set of vectors to search."""

    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Returns indices [Q, count] of the vectors with the highest cosine to each query [Q, D], best first.

        The lower index comes first among equals. There are fewer where there are fewer vectors.
        """


class StageReporter(Protocol):
    """The progress of one stage."""

    def advance(self, n: int = 1, **notes: object) -> None:
        """Adds `n` finished units; notes are short facts to show next to the count, such as dropped=12."""

    def update(self, done: int, total: int, **notes: object) -> None:
        """Sets how many of how many units are finished, for work whose total is known only when it runs."""


class Reporter(Protocol):
    """Shows the user what happens."""

    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> AbstractContextManager[StageReporter]:
        """Opens a stage of `total` units (None: the work tells by `update`); leaving the context ends it.

        Units that an earlier process finished come as one `advance`.
        """

    def row(self, summary: IterationSummary) -> None:
        """Shows the summary of an iteration, which is also in its `summary.json`."""

    def note(self, text: str) -> None:
        """Shows a line of information."""

    def warn(self, text: str) -> None:
        """Shows a warning: the run continues, but the result may suffer."""


@dataclass(frozen=True)
class FineTuneJob:
    """A fine-tuning, which a second call with the same job resumes and ends with the same weights.

    iteration: whose model it makes.
    start: model directory with the weights to start from; None: the base model.
    examples: what to learn from.
    directory: gets `checkpoints/` (resumable training state), `adapter/` (a PEFT directory, before the model, if
        low-rank adapters are trained) and, unless `sft.save` is "adapter", `model/` (a Hugging Face directory); each of
        the last two whole or not at all on a disk.
    card: text of the model card; None: no card.
    """

    iteration: int
    start: epath.Path | None
    examples: Sequence[Example]
    directory: epath.Path
    card: str | None

    @property
    def checkpoints(self) -> epath.Path:
        return self.directory / "checkpoints"

    @property
    def adapter(self) -> epath.Path:
        return self.directory / "adapter"

    @property
    def model(self) -> epath.Path:
        return self.directory / "model"


class Backend(Protocol):
    """Gives models and makes new ones. Holds the weights of one model at a time: two sets may not fit."""

    judge: epath.Path | None
    """Directory of the model that `assess.judge` names; None where that is one of the run's own or a server."""
    evaluation_judge: epath.Path | None
    """Directory of the model that `evaluate.judge` names; None where there is none or it is a server."""
    decoding: Mapping[str, Any]
    """What responses depend on besides weights and prompts, for the record: chat template, dtypes, length, seed."""

    def files(self) -> Mapping[str, epath.Path]:
        """Returns the files of the models that no iteration makes, by names such as "model.path/config.json"."""

    def load(self, directory: epath.Path | None) -> Model:
        """Returns the model in an iteration's `model/` or `adapter/` directory, or the base model for None.

        A call for the model that is held already costs nothing.
        """

    def weights_digest(self, directory: epath.Path | None) -> str:
        """Returns the sha256 of the weights of the model that `load` returns."""

    def write_model(self, adapter: epath.Path, directory: epath.Path, card: str | None) -> None:
        """Writes the whole model that an iteration's `adapter/` stands for, as a new Hugging Face directory.

        card: text of the model card; None: no card.
        """

    def index(self, vectors: np.ndarray) -> Index:
        """Returns an index of the vectors [N, D]."""

    def meter(self) -> Callable[[], Mapping[str, float]]:
        """Starts to measure; a call of the result returns figures of what this process has done since, by name.

        They are for DONE and `fine_tune.json`, see docs/tpu.md; a figure that does not apply is left out.
        """

    def fine_tune(self, job: FineTuneJob, progress: StageReporter) -> dict:
        """Trains on the job's examples and writes its model.

        Returns JSON values about the training, among them "train_loss" (nats per loss token).
        """


class ExampleAnswer(TypedDict):
    """One of a task's prompts with a model's answer, to be read by the user.

    correct: None where the score is no matter of right or wrong.
    """

    instruction: str
    response: str
    correct: bool | None


class FigureResult(TypedDict):
    """A mean with its standard error over `count` units, such as prompts."""

    value: float
    stderr: float
    count: int


class TaskResult(TypedDict):
    """A model's result on an evaluation task, as JSON values: its entry in `evaluation.json`.

    accuracy, stderr: share of the samples that are answered correctly (0 to 1), with its standard error; not there for
        a task that measures something else. loss, stderr: of a task that measures a loss, where lower is better.
    count: samples that were used. of: samples that the task has.
    title, version: of the task. main: name of the figure that stands for the task. figures: by name.
    groups: the main figure by group of samples: {"category": {"writing": ...}}.
    unfinished: share of the responses that were cut off. unanswered: responses that could not be made.
    settings: everything that the responses depend on. scoring: what the scores depend on besides.
    examples: a few answers, to the same prompts for every model.
    """

    accuracy: NotRequired[float]
    loss: NotRequired[float]
    stderr: NotRequired[float]
    count: int
    of: int
    title: str
    version: int
    main: str
    figures: dict[str, FigureResult]
    groups: dict[str, dict[str, FigureResult]]
    unfinished: float
    unanswered: int
    settings: dict[str, Any]
    scoring: dict[str, Any]
    examples: NotRequired[list[ExampleAnswer]]


# Opens the progress of a part of an evaluation: what is done, how many units (None: the work tells), their name.
OpenProgress = Callable[[str, int | None, str], AbstractContextManager[StageReporter]]


def is_fuller(earlier: TaskResult | None, now: TaskResult) -> bool:
    """Returns whether an earlier result was made with the same settings and has more samples."""
    same = earlier is not None and all(earlier[name] == now[name] for name in ("settings", "scoring"))
    return same and earlier["count"] > now["count"]


class Evaluator(Protocol):
    """Measures a model on one task."""

    def __call__(
        self, model: TokenModel, directory: epath.Path, progress: OpenProgress, earlier: TaskResult | None = None
    ) -> TaskResult:
        """Returns the model's result, and keeps every sample in `directory`; a call that was interrupted goes on.

        earlier: the last result that was kept. What is kept of it stays where it is of more samples, see `is_fuller`.
        """

    def check_data(self) -> None:
        """Raises `UserError` where the task's data is missing or damaged."""

    def is_current(self, result: TaskResult) -> bool:
        """Returns whether a result was made with these settings, so that there is nothing left to do."""
