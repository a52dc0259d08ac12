"""The models of a run as the stages see them: who writes, who judges, loaded when first asked."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from etils import epath

from isheep_jax.config import OWN_JUDGES, Config, is_server
from isheep_jax.decode.requests import (
    ChoiceLogprobs,
    Completion,
    Embedding,
    Request,
    SamplingParams,
    TextLogprob,
    TokenIds,
)
from isheep_jax.loop import made_models
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.judging.endpoint import Endpoint
from isheep_jax.loop.judging.judges import own_model
from isheep_jax.loop.protocols import Backend, Model, Tokenizer


@dataclass(frozen=True)
class DeferredModel:
    """A `Model` in a directory (None: the base model), which the backend loads when it is first asked something.

    A stage that is DONE asks nothing, so a run that resumes loads no weights for it. A model that the run made is
    compared with its digests before.
    """

    backend: Backend
    directory: epath.Path | None

    def _model(self) -> Model:
        if self.directory is not None:
            made_models.check(self.directory)
        return self.backend.load(self.directory)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model().tokenizer

    @property
    def max_length(self) -> int:
        return self._model().max_length

    def weights_digest(self) -> str:
        return self.backend.weights_digest(self.directory)

    def generate(
        self, requests: Iterable[Request | None], sampling: SamplingParams
    ) -> Generator[Completion, None, None]:
        return self._model().generate(requests, sampling)

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        return self._model().choice_logprobs(requests, choices)

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str | TokenIds]) -> Iterator[TextLogprob]:
        return self._model().text_logprobs(requests, texts)

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        return self._model().embed(requests)


def writer_of(context: StageContext, backend: Backend) -> Model:
    """Returns the model that writes in an iteration: the one that the iteration before made."""
    return DeferredModel(backend, context.directory.model(context.iteration - 1))


def server_of(config: Config, url: str, *, goes_on: bool = True) -> Model:
    """Returns the judge on a server. goes_on: whether what it says is kept, so that a failure loses little."""
    settings = config.assess
    return Endpoint(
        url,
        settings.judge_model,
        settings.judge_key,
        concurrency=settings.judge_requests,
        seed=config.seed,
        goes_on=goes_on,
    )


def judge_of(context: StageContext, backend: Backend, name: str) -> Model:
    """Returns the judge that a value of `assess.judge` names, in an iteration."""
    if is_server(name):
        return server_of(context.config, name)
    own = name in OWN_JUDGES
    return DeferredModel(backend, own_model(context.directory, name, context.iteration) if own else backend.judge)
