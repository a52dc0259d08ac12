"""The decode engine: a known list of prompts in, completions and choice probabilities out.

Slots are filled from a queue that is sorted once, longest prompt first; the device runs chunks of decode steps; between
two chunks the host reads one packed array, hands out what has finished and refills free slots. What a request's tokens
are does not depend on this schedule: its random key comes from the run's seed and its id, its padded shape from its own
length, and it attends to its own slot only.
"""

import functools
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import allocate, bucket_of, check_rows, data_shards, prefill_rows
from isheep_jax.decode.programs import CONTROL_COLUMNS, KEY, POSITION, REMAINING, TOKEN, compile_decode_chunk, prefill
from isheep_jax.decode.requests import ChoiceScores, Completion, Request, Sampling
from isheep_jax.decode.sampling import request_key
from isheep_jax.decode.scoring import score_choices
from isheep_jax.decode.stops import cut_at_stop, lone_byte, settled_text
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache
from isheep_jax.model.tokenizer import Tokenizer
from isheep_jax.sharding import DECODE_RULES, check_divisible

# While requests wait, a chunk ends early once this share of the slots is idle: a slot left idle costs as much as a busy
# one, and reading back and refilling costs far less than the steps it would idle through.
_IDLE_SHARE = 1 / 8


@dataclass
class _Prompt:
    """A request on its way into a slot: its tokens [P] (int32) and random key [2] (uint32)."""

    id: str
    tokens: np.ndarray
    key: np.ndarray


class Engine:
    """Generates and scores with one set of weights.

    params: the parameter tree, of any float dtype and sharding; not consumed. mesh: the decode mesh, or None for one
    device. seed: the run's seed. A new set of weights is a new Engine: programs are shared and nothing recompiles.
    Raises `UserError` where slots, context or heads do not fit the mesh or the model.
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
        if not 1 < config.context <= architecture.context_length:
            raise UserError(
                f"decode.context={config.context} does not fit the model, whose context is 2 to "
                f"{architecture.context_length} tokens"
            )
        if config.chunk < 1:
            raise UserError(f"decode.chunk={config.chunk} must be at least 1")
        check_rows("decode.slots", config.slots, mesh)
        check_rows("decode.score_batch", config.score_batch, mesh)
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.config = config
        self.mesh = mesh
        self.seed = seed
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.end_ids = tuple(sorted({*tokenizer.eos_ids, *architecture.eos_token_ids}))
        if mesh is not None:
            check_divisible(architecture, mesh, DECODE_RULES)
        self.programs = {"architecture": architecture, "mesh": mesh, "compute_dtype": self.compute_dtype}
        self.decode_program = compile_decode_chunk(
            slots=config.slots, context=config.context, chunk=config.chunk, end_ids=self.end_ids, **self.programs
        )
        # One leaf at a time, to bound the peak of memory.
        self.params = jax.tree.map(
            lambda leaf, where: jax.device_put(jnp.asarray(leaf, self.compute_dtype), where),
            params,
            self.decode_program.weights,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order of finishing.

        Raises ValueError for an id that occurs twice and `UserError` for sampling settings out of range.
        """
        _check_ids(requests)
        _check_sampling(sampling)
        return self._generate(requests, sampling)

    def stream(self, request: Request, sampling: Sampling) -> Generator[str, None, Completion]:
        """One completion, piece by piece as chunks of decode steps finish; the generator returns the `Completion`.

        The pieces join to its text, which is that of `generate`. Raises `UserError` for sampling settings out of range.
        """
        _check_sampling(sampling)
        return self._stream(request, sampling)

    def score(self, requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceScores]:
        """Log-probabilities of the choices after each prompt, by prefill alone, in batches of like length.

        Raises ValueError for an id that occurs twice.
        """
        _check_ids(requests)
        return score_choices(
            self.params,
            self.architecture,
            self.tokenizer,
            requests,
            choices,
            context=self.config.context,
            rows=self.config.score_batch,
            mesh=self.mesh,
            compute_dtype=self.compute_dtype,
        )

    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        prompts = []
        for request in requests:
            prompt = self._prompt(request)
            if isinstance(prompt, Completion):
                yield prompt
            else:
                prompts.append(prompt)
        prompts.sort(key=lambda prompt: (-len(prompt.tokens), prompt.id))
        if prompts:
            for finished in _Generation(self, deque(prompts), sampling).run():
                yield from finished

    def _stream(self, request: Request, sampling: Sampling) -> Generator[str, None, Completion]:
        prompt = self._prompt(request)
        if isinstance(prompt, Completion):
            return prompt
        generation, shown = _Generation(self, deque([prompt]), sampling), ""
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

    def _prompt(self, request: Request) -> _Prompt | Completion:
        """The request with its tokens and key, or the completion that says why it does not fit."""
        tokens = self.tokenizer.encode_prompt(request.prompt)
        if not 0 < len(tokens) < self.config.context:
            return Completion(request.id, "", finish="error", error=self._misfit(len(tokens)))
        return _Prompt(request.id, np.asarray(tokens, np.int32), request_key(self.seed, request.id))

    def _misfit(self, length: int) -> str:
        if not length:
            return "the prompt is empty"
        return f"the prompt has {length} tokens; decode.context={self.config.context} must hold it and a new token"


class _Generation:
    """One call of `generate`: the queue, and the host's view of every slot."""

    def __init__(self, engine: Engine, waiting: deque[_Prompt], sampling: Sampling):
        self.engine = engine
        self.waiting = waiting
        self.sampling = sampling
        slots, context = engine.config.slots, engine.config.context
        self.owner: list[_Prompt | None] = [None] * slots
        self.control = np.zeros((slots, CONTROL_COLUMNS), np.int32)
        self.written = np.zeros((slots, context), np.int32)  # new tokens of each slot
        self.count = np.zeros(slots, np.int32)  # how many

    def run(self) -> Iterator[list[Completion]]:
        """After each chunk of decode steps, what has finished."""
        engine, sampling = self.engine, self.sampling
        slots = engine.config.slots
        cache = allocate(engine.architecture, slots, engine.config.context, engine.compute_dtype, engine.mesh)
        temperature, top_p = np.float32(sampling.temperature), np.float32(sampling.top_p)
        while True:
            cache = self._refill(cache)
            if not self.control[:, REMAINING].any():
                return
            idle_limit = np.int32(max(1, int(slots * _IDLE_SHARE)) if self.waiting else slots)
            cache, drawn = engine.decode_program.run(engine.params, cache, self.control, temperature, top_p, idle_limit)
            yield list(self._collect(np.asarray(drawn)))

    def tokens(self, prompt: _Prompt) -> list[int]:
        """The new tokens so far of a prompt that is in a slot."""
        slot = next(slot for slot, owner in enumerate(self.owner) if owner is prompt)
        return self.written[slot, : self.count[slot]].tolist()

    def _refill(self, cache: KVCache) -> KVCache:
        """Gives waiting prompts to idle slots and prefills them, bucket by bucket."""
        context = self.engine.config.context
        admitted: dict[int, list[int]] = {}
        for slot in np.flatnonzero(self.control[:, REMAINING] == 0):
            if not self.waiting:
                break
            prompt = self.owner[slot] = self.waiting.popleft()
            length = len(prompt.tokens)
            self.control[slot, TOKEN] = prompt.tokens[-1]
            self.control[slot, POSITION] = length - 1
            self.control[slot, REMAINING] = min(self.sampling.max_tokens, context - length)
            self.control[slot, KEY] = prompt.key.view(np.int32)
            self.count[slot] = 0
            admitted.setdefault(bucket_of(length, context), []).append(slot)
        for bucket, slots in admitted.items():
            rows = prefill_rows(bucket, self.engine.mesh)
            for packed in self._pack(slots, bucket, rows):
                cache = prefill(self.engine.params, cache, packed, **self.engine.programs)
        return cache

    def _pack(self, slots: list[int], bucket: int, rows: int) -> Iterator[np.ndarray]:
        """Prompts of the slots as `prefill` takes them, [rows, bucket + 1], until all are in.

        The rows of a data shard take prompts of its own slots.
        """
        shards = data_shards(self.engine.mesh)
        queues: list[deque[int]] = [deque() for _ in range(shards)]
        for slot in slots:
            queues[slot * shards // self.engine.config.slots].append(slot)
        while any(queues):
            packed = np.zeros((rows, bucket + 1), np.int32)
            packed[:, -1] = -1
            for row in range(rows):
                if queue := queues[row * shards // rows]:
                    slot = queue.popleft()
                    tokens = self.owner[slot].tokens
                    packed[row, : len(tokens)] = tokens
                    packed[row, -1] = slot
            yield packed

    def _collect(self, drawn: np.ndarray) -> Iterator[Completion]:
        """Takes in a chunk's tokens [B, chunk] and hands out what has finished."""
        before = self.count.copy()
        row, step = np.nonzero(drawn >= 0)
        self.written[row, before[row] + step] = drawn[row, step]
        new = np.count_nonzero(drawn >= 0, axis=1).astype(np.int32)
        self.count += new
        last = self.written[np.arange(len(new)), np.maximum(self.count - 1, 0)]
        ended = (new > 0) & np.isin(last, self.engine.end_ids)
        self.control[:, TOKEN] = np.where(new > 0, last, self.control[:, TOKEN])
        self.control[:, POSITION] += new
        self.control[:, REMAINING] = np.where(ended, 0, self.control[:, REMAINING] - new)
        for slot in np.flatnonzero(new):
            completion = self._completion(slot, before[slot], ended[slot])
            if completion is not None:
                self.control[slot, REMAINING] = 0
                self.owner[slot] = None
                yield completion

    def _completion(self, slot: int, searched: int, ended: bool) -> Completion | None:
        """The slot's completion if a stop string, an end token or its length has ended it."""
        decode = self.engine.tokenizer.decode
        finished = self.control[slot, REMAINING] == 0
        if not (finished or self.sampling.stop):
            return None
        name = self.owner[slot].id
        tokens = self.written[slot, : self.count[slot] - ended].tolist()
        if self.sampling.stop and tokens:
            cut = cut_at_stop(decode, tokens, self.sampling.stop, int(searched))
            if cut is not None:
                text, kept = cut
                return Completion(name, text, tuple(tokens[:kept]), "stop")
        if not finished:
            return None
        return Completion(name, decode(tokens), tuple(tokens), "stop" if ended else "length")


def _check_ids(requests: Sequence[Request]) -> None:
    seen = set()
    for request in requests:
        if request.id in seen:
            raise ValueError(f"two requests have the id {request.id!r}; ids name results and seed their randomness")
        seen.add(request.id)


def _check_sampling(sampling: Sampling) -> None:
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(f"temperature={sampling.temperature} must be a number from 0 upwards")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p={sampling.top_p} must be above 0 and at most 1")
    if sampling.max_tokens < 1:
        raise UserError(f"max_tokens={sampling.max_tokens} must be at least 1")
    if "" in sampling.stop:
        raise UserError("stop: an empty stop string would end every completion at once")
