"""The decode engine: a known list of prompts in; completions, log-probabilities and embeddings out.

A request's tokens do not depend on the schedule: its random key comes from the run's seed and its id, and its sums are
formed from its own tokens alone, so neighbors, the number of slots and a restart change nothing.
"""

import functools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.config_checks import check_range
from isheep_jax.decode import choice_logprobs, loaded, text_logprobs
from isheep_jax.decode.device_calls import DeviceCalls
from isheep_jax.decode.queue import PromptQueue, longest_first, windows
from isheep_jax.decode.requests import (
    NOT_NUMBERS,
    SAMPLING_RANGES,
    ChoiceLogprobs,
    Completion,
    Embedding,
    Request,
    SamplingParams,
    TextLogprob,
    TokenIds,
)
from isheep_jax.decode.scheduler import Scheduler, known_prompts
from isheep_jax.decode.statistics import Statistics
from isheep_jax.decode.stops import incomplete_utf8_token, stable_text
from isheep_jax.decode.tokenization import TokenizedPrompt, many_prompt_tokens
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.text.tokenizer import Tokenizer

# From so many prompts on, a model that computes numbers for none of them is at fault, not the prompts.
_SEVERAL = 8


class Engine:
    """Generates and scores with one set of weights.

    A new set of weights is a new engine: compiled programs are shared, so nothing recompiles.
    """

    def __init__(
        self,
        params: Any,
        architecture: Architecture,
        tokenizer: Tokenizer,
        config: DecodeConfig,
        *,
        mesh: Mesh,
        seed: int,
        compute_dtype: str | jnp.dtype = "bfloat16",
    ):
        """Places the weights on the devices.

        Args:
            params: parameter tree, of any float dtype and sharding, or with `Quantized` matrices; not consumed.
            architecture: the model's sizes.
            tokenizer: the model's tokenizer.
            config: slots, lengths and dtypes of decoding.
            mesh: the decode mesh, see `sharding.decode_mesh`.
            seed: the run's seed.
            compute_dtype: dtype of activations, and of weights and KV cache unless these are int8.

        Raises `UserError` when slots, lengths or heads do not fit the mesh or the model.
        """
        self.model = loaded.load(
            params, architecture, tokenizer, config, mesh=mesh, seed=seed, compute_dtype=compute_dtype
        )

    @property
    def config(self) -> DecodeConfig:
        """The settings, with the model's context length instead of max_length=0."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, for callers that give token ids."""
        return self.model.tokenizer

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt with what follows it."""
        return self.model.config.max_length

    @property
    def statistics(self) -> Statistics:
        """What the engine has counted so far."""
        return self.model.statistics

    def generate(
        self, requests: Iterable[Request | None], sampling: SamplingParams
    ) -> Generator[Completion, None, None]:
        """Yields one completion for each request, in the order in which they finish.

        Requests that are no sequence are a stream: they are taken as slots become idle, and None says that there are
        none before more completions have come out. Who has enough closes the generator.

        A prompt that does not fit is a completion with finish_reason "error". Raises ValueError for an id that occurs
        twice and `UserError` for sampling parameters out of range, both before anything is decoded, and `UserError` at
        the end if the model computes numbers for none of several prompts.
        """
        if isinstance(requests, Sequence):
            _check_ids(requests)
        _check_sampling(sampling)
        return self._generate(requests, sampling)

    def stream(self, request: Request, sampling: SamplingParams) -> Generator[str, None, Completion]:
        """Yields one completion's text in pieces, after each call of the decode program; returns the `Completion`.

        The pieces join to the completion's text, which is that of `generate`. Raises `UserError` for sampling
        parameters out of range.
        """
        _check_sampling(sampling)
        return self._stream(request, sampling)

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        """Yields one log-probability for each choice after each prompt, by prefill alone, in any order.

        A choice is tokenized together with its prompt. Its log-probability is the sum over its tokens, less what
        belongs to longer choices that begin with them. A prompt that does not fit with its longest choice is a result
        with an error. Raises ValueError for an id that occurs twice, for no choice and for more than `MAX_CHOICES`.
        """
        _check_ids(requests)
        if not 0 < len(choices) <= choice_logprobs.MAX_CHOICES:
            raise ValueError(f"{len(choices)} choices to score: from 1 to {choice_logprobs.MAX_CHOICES} are possible")
        return choice_logprobs.choice_logprobs(self.model, requests, choices)

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str | TokenIds]) -> Iterator[TextLogprob]:
        """Yields the log-probability of one text after each prompt, by prefill alone, in any order.

        texts[i] continues the prompt of requests[i]; after token ids it must be token ids. A prompt that does not fit
        with its text is a result with an error. Raises ValueError for an id that occurs twice and when there are not as
        many texts as requests.
        """
        _check_ids(requests)
        if len(texts) != len(requests):
            raise ValueError(f"{len(texts)} texts for {len(requests)} requests")
        return text_logprobs.text_logprobs(self.model, requests, texts)

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        """Yields the mean of the last hidden states (after the final norm) over each prompt, [D], in any order.

        A prompt that does not fit is a result with an error. Raises ValueError for an id that occurs twice.
        """
        _check_ids(requests)
        return text_logprobs.embed(self.model, requests)

    def _generate(
        self, requests: Iterable[Request | None], sampling: SamplingParams
    ) -> Generator[Completion, None, None]:
        failed: list[Completion] = []
        queue = PromptQueue(self._prompts(requests, sampling, failed))
        decoded = not_numbers = 0
        while True:
            queue.fill(known_prompts(self.model))
            stuck = not (failed or queue.head)
            yield from _drained(failed)
            if queue.head:
                for finished in Scheduler(self.model, queue, sampling, DeviceCalls).run():
                    decoded += len(finished)
                    not_numbers += sum(completion.error == NOT_NUMBERS for completion in finished)
                    yield from _drained(failed)
                    yield from finished
            elif queue.is_exhausted:
                break
            elif stuck:
                raise RuntimeError("a stream of requests waits for results, but all of them are out")
        if decoded == not_numbers >= _SEVERAL:
            raise UserError(NOT_NUMBERS)

    def _prompts(
        self, requests: Iterable[Request | None], sampling: SamplingParams, failed: list[Completion]
    ) -> Iterator[TokenizedPrompt | None]:
        """Yields the prompts of requests in the order in which they should be decoded, and None as a stream does.

        failed: gets a completion for each that does not fit.
        """
        if not isinstance(requests, Sequence):
            for request in requests:
                if request is None:
                    yield None
                else:
                    yield from self._tokenized([request], failed)
            return
        for window in windows(requests, self.config.slots):
            yield from longest_first(self._tokenized(window, failed), sampling.max_tokens, self.max_length)

    def _tokenized(self, requests: Sequence[Request], failed: list[Completion]) -> Iterator[TokenizedPrompt]:
        tokenized = many_prompt_tokens(self.tokenizer, [request.prompt for request in requests])
        for request, tokens in zip(requests, tokenized, strict=True):
            try:
                if isinstance(tokens, UserError):
                    raise tokens
                yield self.model.tokenize(request, tokens=tokens)
            except UserError as error:
                failed.append(Completion(request.id, "", finish_reason="error", error=str(error)))

    def _stream(self, request: Request, sampling: SamplingParams) -> Generator[str, None, Completion]:
        try:
            prompt = self.model.tokenize(request)
        except UserError as error:
            return Completion(request.id, "", finish_reason="error", error=str(error))
        scheduler, shown = Scheduler(self.model, PromptQueue(iter([prompt])), sampling, DeviceCalls), ""
        for finished in scheduler.run():
            text = finished[0].text if finished else self._stable_text(scheduler.tokens_of(prompt), sampling.stop)
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if finished:
                return finished[0]
        raise RuntimeError("the only prompt never finished")

    def _stable_text(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        return stable_text(self.model.tokenizer.decode, tokens, stop, self._incomplete_utf8_token)

    @functools.cached_property
    def _incomplete_utf8_token(self) -> int | None:
        return incomplete_utf8_token(self.model.tokenizer.decode, self.model.tokenizer.vocab_size)


def _drained(completions: list[Completion]) -> Iterator[Completion]:
    """Yields the completions and removes them."""
    while completions:
        yield completions.pop(0)


def _check_ids(requests: Sequence[Request]) -> None:
    seen = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(f"two requests have the id {request.id!r}; ids name results and seed their randomness")
        seen.add(request.id)


def _check_sampling(sampling: SamplingParams) -> None:
    for name, interval in SAMPLING_RANGES.items():
        check_range(name, getattr(sampling, name), interval)
    if "" in sampling.stop:
        raise UserError("stop: an empty stop string would end every completion at once")
