"""The decode engine's speed on lists of requests like those of the loop, beside what the machine's ceilings allow."""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.decode.statistics import Statistics
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.planning.cost import forward_flops, matrix_parameters
from isheep_jax.speed.ceilings import Ceilings
from isheep_jax.speed.workloads import Workload

_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Limit:
    """The least seconds that a workload takes at the ceilings.

    Each part is bound by its arithmetic or by its memory traffic, whichever takes longer, and no padding, sampling or
    waiting is counted. prompts: all prompt tokens. steps: products with the weights of all decode steps, of which there
    are at least as many as the longest completion has tokens. cache: attention of the decode steps.
    """

    prompts: float
    steps: float
    cache: float

    @property
    def seconds(self) -> float:
        return self.prompts + self.steps + self.cache


@dataclass(frozen=True)
class Speed:
    """One workload's run. prompt_tokens, new_tokens: that were asked for, the head once. compilations: in the run."""

    workload: str
    requests: int
    slots: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    compilations: int
    limit: Limit
    statistics: Statistics

    @property
    def fraction(self) -> float:
        """Of the limit (0 to 1)."""
        return self.limit.seconds / self.seconds

    @property
    def idle(self) -> float:
        """Share of the time in which the devices waited for the host (0 to 1)."""
        return self.statistics.idle_seconds / self.seconds

    @property
    def idle_per_chunk(self) -> float:
        """Seconds that the devices waited for the host, for each decode chunk."""
        return self.statistics.idle_seconds / max(self.statistics.chunks, 1)

    def as_dict(self) -> dict:
        names = ("workload", "requests", "slots", "seconds", "prompt_tokens", "new_tokens", "compilations")
        return {
            **{name: getattr(self, name) for name in names},
            "requests_per_second": self.requests / self.seconds,
            "tokens_per_second": (self.prompt_tokens + self.new_tokens) / self.seconds,
            "limit": dataclasses.asdict(self.limit) | {"seconds": self.limit.seconds},
            "fraction_of_limit": self.fraction,
            "idle_share": self.idle,
            "idle_seconds_per_chunk": self.idle_per_chunk,
            "occupancy": self.statistics.occupancy,
            "packing": self.statistics.packing,
            "statistics": dataclasses.asdict(self.statistics),
        }


def measure_speed(engine: Engine, workload: Workload, ceilings: Ceilings) -> Speed:
    """Runs the workload twice and measures the second run, for which all is compiled.

    The engine's tokenizer is a `workloads.IdTokenizer`.
    """
    _run(engine, workload)
    before = copy.copy(engine.statistics)
    with _compilations() as compiled:
        start = time.perf_counter()
        _run(engine, workload)
        seconds = time.perf_counter() - start
    prompt_tokens = workload.head_length + sum(workload.prompt_lengths)
    statistics = engine.statistics - before
    slots = 0 if workload.kind == "score" else statistics.slots
    return Speed(
        workload=workload.name,
        requests=len(workload),
        slots=slots,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        new_tokens=sum(workload.new_tokens),
        compilations=len(compiled),
        limit=least_time(engine, workload, slots, ceilings),
        statistics=statistics,
    )


def least_time(engine: Engine, workload: Workload, slots: int, ceilings: Ceilings) -> Limit:
    """See `Limit`. slots: sequences that a step decodes."""
    a = engine.architecture
    _, head = matrix_parameters(a)
    prompts = workload.head_length * sum(forward_flops(a, 1, workload.head_length / 2))
    for length in workload.prompt_lengths:
        prompts += sum(forward_flops(a, length, workload.head_length + length / 2))
    if workload.kind == "score":
        prompts += 2.0 * head * len(workload)
        return Limit(prompts / ceilings.flops, 0.0, 0.0)
    operations = scores = read = 0.0
    each = 2 * a.layers * a.kv_heads * a.head_dim * engine.chunk_shape.cache_dtype.itemsize
    for length, new in zip(workload.prompt_lengths, workload.new_tokens):
        matrices, attention = forward_flops(a, new, workload.head_length + length + new / 2)
        operations += matrices + 2.0 * head * new
        scores += attention
        read += new * (length + new / 2) * each
    steps = max(sum(workload.new_tokens) / slots, max(workload.new_tokens))
    table = abstract_weights(a, engine.config.weights_dtype, engine.compute_dtype)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(table))
    if not a.tied_embeddings:  # of which only a few rows are read
        held -= head * jnp.dtype(engine.compute_dtype).itemsize
    replicas = 1 if engine.mesh is None else engine.mesh.shape["data"]
    return Limit(
        prompts / ceilings.flops,
        max(operations / ceilings.flops, steps * held * replicas / ceilings.bandwidth),
        max(scores / ceilings.flops, read / ceilings.bandwidth),
    )


def _run(engine: Engine, workload: Workload) -> None:
    requests = workload.requests(engine.architecture.vocab_size)
    if workload.kind == "score":
        results = list(engine.choice_logprobs(requests, workload.choice_texts()))
        wrong = [r.id for r in results if r.error or len(r.logprobs) != workload.choices]
    else:
        results = list(engine.generate(requests, SamplingParams(temperature=1.0)))
        asked = {request.id: request.max_tokens for request in requests}
        wrong = [r.id for r in results if len(r.tokens) != asked[r.id]]
    if wrong or len(results) != len(requests):
        raise RuntimeError(f"{len(wrong)} of {len(requests)} requests did not get what they asked for: {wrong[:3]}")


@contextlib.contextmanager
def _compilations() -> Iterator[list[float]]:
    """Seconds of each compilation within the context."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == _COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
