"""The decode engine: a known list of prompts in, completions and probabilities out.

What a request's tokens are does not depend on the schedule: its random key comes from the run's seed and its id, and
how its sums are formed from its own tokens, so that neighbors, the number of slots and a restart change nothing.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode import scoring
from isheep_jax.decode.cache import alignment, bucket_of, check_rows, data_shards
from isheep_jax.decode.capacity import free_slots
from isheep_jax.decode.programs import ChunkShape, Prefix, make_prefix, weight_places
from isheep_jax.decode.requests import ChoiceLogprobs, Completion, Embedding, Request, SamplingParams, TextLogprob
from isheep_jax.decode.scheduler import Generation
from isheep_jax.decode.statistics import Statistics
from isheep_jax.decode.stops import lone_byte, settled_text
from isheep_jax.decode.tokenization import TokenizedPrompt, TooLong, tokenize
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.model.quantization import check_storage_dtype, put_weight
from isheep_jax.sharding import DECODE_RULES, check_divisible
from isheep_jax.text.tokenizer import Tokenizer

# Slots of the program that chooses where weights lie, where the settings leave them to each call.
_NOMINAL_SLOTS = 64


class Engine:
    """Generates and scores with one set of weights.

    params: the parameter tree, of any float dtype and sharding, or with `Quantized` matrices; not consumed. mesh: the
    decode mesh, or None for one device. seed: the run's seed. A new set of weights is a new Engine: programs are shared
    and nothing recompiles. statistics: what it has done so far. Raises `UserError` where slots, context or heads do not
    fit the mesh or the model.
    """

    def __init__(
        self,
        params: dict,
        architecture: Architecture,
        tokenizer: Tokenizer,
        config: DecodeConfig,
        *,
        mesh: Mesh | None,
        seed: int,
        compute_dtype: str | jnp.dtype = "bfloat16",
    ):
        if config.max_length != 0 and not 1 < config.max_length <= architecture.context_length:
            raise UserError(
                f"decode.max_length={config.max_length} does not fit the model, whose context is 2 to "
                f"{architecture.context_length} tokens (0: all of it)"
            )
        config = dataclasses.replace(config, max_length=config.max_length or architecture.context_length)
        if config.steps_per_call < 1:
            raise UserError(f"decode.steps_per_call={config.steps_per_call} must be at least 1")
        check_storage_dtype("decode.weights_dtype", config.weights_dtype)
        check_storage_dtype("decode.kv_cache_dtype", config.kv_cache_dtype)
        if config.slots:
            check_rows("decode.slots", config.slots, mesh)
        elif jax.process_count() > 1:
            raise UserError("decode.slots: 0 (by free memory) is for one process; with several it must be a number")
        if mesh is not None:
            check_divisible(parameter_table(architecture), mesh, DECODE_RULES)
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.config = config
        self.mesh = mesh
        self.seed = seed
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.end_ids = tuple(sorted({*tokenizer.eos_ids, *architecture.eos_token_ids}))
        # What every program is compiled for, and a decode chunk besides.
        self.static = {"architecture": architecture, "mesh": mesh, "compute_dtype": self.compute_dtype}
        self.chunk_shape = ChunkShape(
            slots=config.slots or _NOMINAL_SLOTS * data_shards(mesh),
            context=config.max_length,
            chunk=config.steps_per_call,
            end_ids=self.end_ids,
            weights=config.weights_dtype,
            cache=config.kv_cache_dtype,
            **self.static,
        )
        places = weight_places(self.chunk_shape)
        # One leaf at a time, to bound the peak of memory.
        place = functools.partial(put_weight, dtype=self.compute_dtype)
        self.params = jax.tree.map(place, parameter_table(architecture), params, places)
        self.statistics = Statistics()

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        """Completions in the order of finishing.

        Raises ValueError for an id that occurs twice and `UserError` for sampling settings out of range.
        """
        _check_ids(requests)
        _check_sampling(sampling)
        return self._generate(requests, sampling)

    def stream(self, request: Request, sampling: SamplingParams) -> Generator[str, None, Completion]:
        """One completion, piece by piece as chunks of decode steps finish; the generator returns the `Completion`.

        The pieces join to its text, which is that of `generate`. Raises `UserError` for sampling settings out of range.
        """
        _check_sampling(sampling)
        return self._stream(request, sampling)

    def choice_logprobs(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
        """Log-probabilities of the choices after each prompt, by prefill alone.

        A choice is tokenized together with its prompt. Raises ValueError for an id that occurs twice and for no choice.
        """
        _check_ids(requests)
        if not choices:
            raise ValueError("there are no choices to score")
        return scoring.score_choices(self, requests, choices)

    def text_logprobs(self, requests: Sequence[Request], texts: Sequence[str]) -> Iterator[TextLogprob]:
        """Log-probability of one text each after the prompts, by prefill alone.

        Raises ValueError for an id that occurs twice or when there are not as many texts as requests.
        """
        _check_ids(requests)
        if len(texts) != len(requests):
            raise ValueError(f"{len(texts)} texts for {len(requests)} requests")
        return scoring.score_texts(self, requests, texts)

    def embed(self, requests: Sequence[Request]) -> Iterator[Embedding]:
        """The mean of the last hidden states (after the final norm) over each prompt.

        Raises ValueError for an id that occurs twice.
        """
        _check_ids(requests)
        return scoring.embed(self, requests)

    def tokenize(self, request: Request, spare: int = 1) -> TokenizedPrompt:
        """A request's tokens. Raises `TooLong` unless the context holds them and `spare` more."""
        return tokenize(self.tokenizer, request, self.seed, self.config.max_length, spare)

    def prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """Keys and values of what requests share; None where they share nothing."""
        if not tokens:
            return None
        length = bucket_of(len(tokens), alignment(self.mesh))
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        return make_prefix(self.params, padded, np.int32(len(tokens)), **self.static)

    def slots(self, context: int, useful: int) -> int:
        """How many sequences of `context` tokens are decoded at the same time.

        As set, or as many as memory holds, but not many more than are useful.
        """
        return self.config.slots or free_slots(dataclasses.replace(self.chunk_shape, context=context), useful)

    def _generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        groups: dict[tuple[int, ...], list[TokenizedPrompt]] = {}
        for request in requests:
            try:
                prompt = self.tokenize(request)
            except TooLong as error:
                yield Completion(request.id, "", finish_reason="error", error=str(error))
            else:
                groups.setdefault(prompt.shared, []).append(prompt)
        for _, prompts in sorted(groups.items()):
            for finished in Generation(self, prompts, sampling).run():
                yield from finished

    def _stream(self, request: Request, sampling: SamplingParams) -> Generator[str, None, Completion]:
        try:
            prompt = self.tokenize(request)
        except TooLong as error:
            return Completion(request.id, "", finish_reason="error", error=str(error))
        generation, shown = Generation(self, [prompt], sampling), ""
        settled = functools.partial(settled_text, self.tokenizer.decode, stop=sampling.stop, byte=self._lone_byte)
        for finished in generation.run():
            text = finished[0].text if finished else settled(generation.tokens(prompt))
            if len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if finished:
                return finished[0]
        raise RuntimeError("the only prompt never finished")

    @functools.cached_property
    def _lone_byte(self) -> int | None:
        return lone_byte(self.tokenizer.decode, self.tokenizer.vocab_size)


def _check_ids(requests: Sequence[Request]) -> None:
    seen = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(f"two requests have the id {request.id!r}; ids name results and seed their randomness")
        seen.add(request.id)


def _check_sampling(sampling: SamplingParams) -> None:
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(f"temperature={sampling.temperature} must be a number from 0 upward")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p={sampling.top_p} must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise UserError(f"top_k={sampling.top_k} must be at least 0 (all tokens)")
    if not 0 <= sampling.min_p <= 1:
        raise UserError(f"min_p={sampling.min_p} must be a number from 0 to 1")
    if not 0 < sampling.repetition_penalty < float("inf"):
        raise UserError(f"repetition_penalty={sampling.repetition_penalty} must be above 0; 1 is none")
    if not abs(sampling.presence_penalty) < float("inf"):
        raise UserError(f"presence_penalty={sampling.presence_penalty} must be a number; 0 is none")
    if sampling.max_tokens < 1:
        raise UserError(f"max_tokens={sampling.max_tokens} must be at least 1")
    if "" in sampling.stop:
        raise UserError("stop: an empty stop string would end every completion at once")
