"""What the rules of selection look at beside scores: likelihoods of responses and embeddings of instructions."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from isheep_jax import distributed
from isheep_jax.decode.requests import Request, TextLogprob
from isheep_jax.loop.filters import clusters
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.loop.records import Pair, Vector, user_text
from isheep_jax.loop.run_directory import Stage
from isheep_jax.text.conversation import Prompt

# The highest perplexity that is told apart from others.
_HIGHEST = 1e9


def likelihoods(
    model: Model,
    pairs: Sequence[Pair],
    prompts: Mapping[str, Prompt],
    stage: Stage[TextLogprob],
    iteration: int,
    progress: StageReporter,
) -> list[TextLogprob]:
    """How probable each pair's response is to the model. prompts: what was answered, by the pair's instruction_id."""

    def process(block: Sequence[Pair]) -> Iterator[tuple[int, TextLogprob]]:
        requests = [Request(f"{iteration}/likelihood/{x.id}", prompts[x.instruction_id]) for x in block]
        index = {request.id: i for i, request in enumerate(requests)}
        for found in model.text_logprobs(requests, [x.response for x in block]):
            i = index[found.id]
            # Four places, as of scores: above the noise of another device count.
            yield i, TextLogprob(block[i].id, round(found.logprob, 4), found.tokens, found.error)

    records = stage.work(pairs, process, progress.advance)
    known = sorted(value for r in records if (value := perplexity(r)) is not None)
    stage.finish({"records": len(records), **({"median_perplexity": known[len(known) // 2]} if known else {})})
    return records


def perplexity(score: TextLogprob) -> float | None:
    """exp of the mean negative log-probability per token; None where there is none."""
    if score.error or not score.tokens or math.isnan(score.logprob):
        return None
    return round(math.exp(min(-score.logprob / score.tokens, math.log(_HIGHEST))), 4)


def vectors(
    model: Model, texts: Mapping[str, str], stage: Stage[Vector], iteration: int, progress: StageReporter
) -> list[Vector]:
    """The embedding of each text, by its id."""

    def process(block: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Vector]]:
        requests = [Request(f"{iteration}/embed/{id}", text) for id, text in block]
        index = {request.id: i for i, request in enumerate(requests)}
        for found in model.embed(requests):
            i = index[found.id]
            yield i, Vector(block[i][0], "" if found.error else clusters.encode(found.vector), found.error)

    records = stage.work(list(texts.items()), process, progress.advance)
    stage.finish({"records": len(records)})
    return records


def instruction_texts(pairs: Sequence[Pair]) -> dict[str, str]:
    """What is embedded of each instruction: it and its input, by its id."""
    return {p.instruction_id: user_text(p.instruction, p.input) for p in pairs}


def cluster(records: Sequence[Vector], count: int, purpose: str) -> dict[str, int | None]:
    """The cluster of each embedding, by its id. purpose: decides the random numbers, such as "0/1/clusters"."""
    there = [r for r in records if not r.error]
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")

    def numbers() -> list[int]:
        return clusters.k_means(np.stack([clusters.decode(r.vector) for r in there]), count, seed).tolist()

    # One process decides: sums of another processor may differ in their last bit.
    found = distributed.from_primary(numbers) if there else []
    return {**{r.id: None for r in records}, **{r.id: n for r, n in zip(there, found, strict=True)}}
