"""The decode engine's speed on lists of requests like those of the loop, against what the machine's ceilings allow."""

import copy
import dataclasses
import time
from dataclasses import dataclass

import jax

from isheep_jax.decode.cache import data_shards
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.decode.statistics import Statistics
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.planning.cost import forward_flops, matrix_parameters
from isheep_jax.runtime.compilations import compilations
from isheep_jax.speed.ceilings import Ceilings
from isheep_jax.speed.workloads import Workload


@dataclass(frozen=True)
class Limit:
    """The least seconds that a workload takes at the ceilings.

    Each part is bound by its arithmetic or by its memory traffic, whichever takes longer. Padding, sampling and waiting
    are not counted.

    prompts: prefill of all prompt tokens.
    steps: products with the weights in all decode steps, of which there are at least as many as the longest completion
      has tokens.
    cache: attention of the decode steps.
    """

    prompts: float
    steps: float
    cache: float

    @property
    def seconds(self) -> float:
        return self.prompts + self.steps + self.cache


@dataclass(frozen=True)
class Speed:
    """One workload's measured run.

    prompt_tokens: tokens of all prompts; a shared prefix counts once.
    new_tokens: tokens of all completions.
    compilations: programs compiled, or taken from the cache of compiled programs, during the run.
    """

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
        """The limit's seconds as a share of the measured ones (0 to 1)."""
        return self.limit.seconds / self.seconds

    @property
    def idle_share(self) -> float:
        """Share of the time in which the devices waited for the host (0 to 1)."""
        return self.statistics.idle_seconds / self.seconds

    @property
    def idle_per_call(self) -> float:
        """Seconds that the devices waited for the host, for each call of the decode program."""
        return self.statistics.idle_seconds / max(self.statistics.calls, 1)

    def as_dict(self) -> dict:
        """Returns the figures as JSON values."""
        names = ("workload", "requests", "slots", "seconds", "prompt_tokens", "new_tokens", "compilations")
        return {
            **{name: getattr(self, name) for name in names},
            "requests_per_second": self.requests / self.seconds,
            "tokens_per_second": (self.prompt_tokens + self.new_tokens) / self.seconds,
            "limit": dataclasses.asdict(self.limit) | {"seconds": self.limit.seconds},
            "fraction_of_limit": self.fraction,
            "idle_share": self.idle_share,
            "idle_seconds_per_call": self.idle_per_call,
            "occupancy": self.statistics.occupancy,
            "packing": self.statistics.packing,
            "statistics": dataclasses.asdict(self.statistics),
        }


def measure_speed(engine: Engine, workload: Workload, ceilings: Ceilings) -> Speed:
    """Runs the workload twice and measures the second run, for which everything is compiled.

    engine: an engine with a `workloads.IdTokenizer`.
    """
    _run(engine, workload)
    before, known = copy.copy(engine.statistics), compilations()
    start = time.perf_counter()
    _run(engine, workload)
    seconds = time.perf_counter() - start
    prompt_tokens = workload.prefix_length + sum(workload.prompt_lengths)
    statistics = engine.statistics - before
    slots = 0 if workload.kind == "score" else statistics.slots
    return Speed(
        workload=workload.name,
        requests=len(workload),
        slots=slots,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        new_tokens=sum(workload.new_tokens),
        compilations=(compilations() - known).programs,
        limit=least_time(engine, workload, slots, ceilings),
        statistics=statistics,
    )


def least_time(engine: Engine, workload: Workload, slots: int, ceilings: Ceilings) -> Limit:
    """Returns the `Limit` of a workload.

    Args:
        engine: the model and its settings.
        workload: the lengths of the requests.
        slots: sequences that a decode step advances.
        ceilings: what the machine does at best.
    """
    model, a = engine.model, engine.model.architecture
    _, lm_head = matrix_parameters(a)
    prompt_flops = workload.prefix_length * sum(forward_flops(a, 1, workload.prefix_length / 2))
    for length in workload.prompt_lengths:
        prompt_flops += sum(forward_flops(a, length, workload.prefix_length + length / 2))
    if workload.kind == "score":
        prompt_flops += 2.0 * lm_head * len(workload)
        return Limit(prompt_flops / ceilings.flops, 0.0, 0.0)
    step_flops = attention_flops = cache_bytes = 0.0
    position_bytes = 2 * a.layers * a.kv_heads * a.head_dim * model.nominal_shape.cache_dtype.itemsize
    for length, new in zip(workload.prompt_lengths, workload.new_tokens):
        matrices, attention = forward_flops(a, new, workload.prefix_length + length + new / 2)
        step_flops += matrices + 2.0 * lm_head * new
        attention_flops += attention
        cache_bytes += new * (length + new / 2) * position_bytes
    steps = max(sum(workload.new_tokens) / slots, max(workload.new_tokens))
    weights = abstract_weights(a, model.config.weights_dtype, model.compute_dtype)
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    if not a.tied_embeddings:  # a step reads only a few rows of the embeddings
        weight_bytes -= lm_head * model.compute_dtype.itemsize
    replicas = data_shards(model.mesh)
    return Limit(
        prompt_flops / ceilings.flops,
        max(step_flops / ceilings.flops, steps * weight_bytes * replicas / ceilings.bandwidth),
        max(attention_flops / ceilings.flops, cache_bytes / ceilings.bandwidth),
    )


def _run(engine: Engine, workload: Workload) -> None:
    requests = workload.requests(engine.model.architecture.vocab_size)
    if workload.kind == "score":
        results = list(engine.choice_logprobs(requests, workload.choice_texts()))
        wrong = [r.id for r in results if r.error or len(r.logprobs) != workload.choices]
    else:
        results = list(engine.generate(requests, SamplingParams(temperature=1.0)))
        lengths = {request.id: request.max_tokens for request in requests}
        wrong = [r.id for r in results if len(r.tokens) != lengths[r.id]]
    if wrong or len(results) != len(requests):
        raise RuntimeError(f"{len(wrong)} of {len(requests)} requests have results of another length: {wrong[:3]}")
