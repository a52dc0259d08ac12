"""What the loop needs from the rest of the program, as protocols: so that its tests run on a scripted model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NotRequired, Protocol, TypedDict

import numpy as np
from etils import epath

from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Embedding, Request, SamplingParams, TextLogprob
from isheep_jax.sft.examples import Example


class Model(Protocol):
    """A language model that writes and scores text.

    The answer to a request depends only on the model, the request, the sampling and the run's seed: not on the other
    requests, their order or a restart.
    """

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        """One completion per request, in the order in which they finish; found by id."""

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        """Natural-log probability of each choice as the continuation of each request's prompt; found by id."""

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> Iterator[TextLogprob]:
        """Natural-log probability of each text after the prompt of the request of the same index; found by id.

        After a conversation the text is the response as the chat template writes it, its end of turn left out; a
        response has no white space around it, but a template may put some.
        """

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        """Mean of the last layer's hidden states over each prompt's tokens; found by id."""


class Index(Protocol):
    """Vectors to search in."""

    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Indices [Q, count] of the vectors with the highest cosine to each of the queries [Q, D], best first.

        Of equals the lowest index comes first. There are fewer where there are fewer vectors.
        """


class Backend(Protocol):
    """Gives models and makes new ones."""

    judge: epath.Path | None
    """Directory of the model that `assess.judge` names; None where that is one of the run's own or a server."""

    def index(self, vectors: np.ndarray) -> Index:
        """To search in the vectors [N, D]."""

    def load(self, directory: epath.Path | None) -> Model:
        """The model in an iteration's `model/` directory, or the base model for None.

        The loop holds one model at a time and lets go of it before it asks for the next or fine-tunes.
        """

    def fine_tune(
        self,
        start: epath.Path | None,
        examples: Sequence[Example],
        *,
        iteration: int,
        checkpoints: epath.Path,
        output: epath.Path,
        adapter: epath.Path,
        card: str,
        on_step: Callable[[int, int, dict], None],
    ) -> dict:
        """Trains on the examples and writes a Hugging Face directory to `output`, on a disk whole or not at all.

        adapter: where a PEFT directory goes, before `output` and whole or not at all, if low-rank adapters are trained.
        start: weights to start from (None: the base model's). checkpoints: resumable training state; a second call
        with the same arguments goes on from there and ends with the same weights. card: text of the model card.
        on_step(step, steps in all, metrics): called after each update, or after each few.
        Returns JSON values about the training, among them "train_loss" (nats per token).
        """


class ExampleAnswer(TypedDict):
    """One of a task's prompts with a model's answer, to be read by the user."""

    instruction: str
    response: str
    correct: bool


class TaskResult(TypedDict):
    """How a model does on an evaluation task, as JSON values; a task may add others.

    accuracy: share of the prompts that are answered correctly (0 to 1). stderr: its standard error. count: number of
    prompts. examples: a few answers, to the same prompts for every model.
    """

    accuracy: float
    stderr: float
    count: int
    examples: NotRequired[list[ExampleAnswer]]


# Measures a model on a task: gets the model and `progress(done, total)`.
Evaluator = Callable[[Model, Callable[[int, int], None]], TaskResult]


class StageReporter(Protocol):
    """The progress of one stage."""

    def advance(self, n: int = 1, **notes: object) -> None:
        """`n` more units are done; notes are short facts to show beside the bar, such as dropped=12."""


class Reporter(Protocol):
    """Tells a person what happens."""

    def stage(self, iteration: int, name: str, total: int, unit: str) -> AbstractContextManager[StageReporter]:
        """Opens a stage of `total` units; leaving the context ends it. Units done earlier come as one `advance`."""

    def row(self, row: dict) -> None:
        """The summary of an iteration, also written to its `summary.json`."""

    def note(self, text: str) -> None:
        """A line of information."""

    def warn(self, text: str) -> None:
        """A line that a person should see: the run goes on, but the result may suffer."""
