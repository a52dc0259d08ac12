"""Measures what some selection rules need besides scores: perplexities of responses, clusters of instructions."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from isheep_jax import distributed
from isheep_jax.decode.requests import Request
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.filters import clusters
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Likelihood, Pair, Vector, user_text
from isheep_jax.loop.selection.rules import needs_clusters, needs_perplexities
from isheep_jax.loop.selection.select import Measures
from isheep_jax.text.conversation import Prompt

# Higher perplexities are recorded as this one.
_HIGHEST = 1e9


def measure(context: StageContext, judge: Model, pairs: Sequence[Pair], prompts: Mapping[str, Prompt]) -> Measures:
    """Returns what the rule of selection needs of the (kept) pairs besides their scores.

    prompts: what was answered, by the pair's instruction_id.
    """
    perplexities: dict[str, float | None] = {}
    by_cluster: dict[str, int | None] = {}
    if needs_perplexities(context.config):
        perplexities = {x.id: perplexity(x) for x in likelihoods(context, judge, pairs, prompts)}
    if needs_clusters(context.config):
        texts = {p.instruction_id: user_text(p.instruction, p.input) for p in pairs}
        vectors = embed(context, judge, texts, stage="vectors")
        purpose = f"{context.config.seed}/{context.request_id('clusters', context.turn)}"
        by_cluster = cluster(vectors, context.config.select.clusters, purpose)
    return Measures(perplexities, by_cluster)


def likelihoods(
    context: StageContext, judge: Model, pairs: Sequence[Pair], prompts: Mapping[str, Prompt]
) -> list[Likelihood]:
    """Returns how probable each pair's response is to the judge, after the prompt that was answered."""
    with context.open("likelihoods", len(pairs)) as stage:
        for block in stage.blocks(pairs):
            requests = [Request(context.request_id("likelihood", x.id), prompts[x.instruction_id]) for x in block]
            for i, result in by_request(requests, judge.text_logprobs(requests, [x.response for x in block])):
                # Four places, as for scores: above the noise of another device count.
                stage.put(i, Likelihood(block[i].id, round(result.logprob, 4), result.tokens, result.error))
        known = sorted(value for r in stage.records if (value := perplexity(r)) is not None)
        if known:
            stage.summary["median_perplexity"] = known[len(known) // 2]
    return stage.records


def perplexity(result: Likelihood) -> float | None:
    """Returns exp of the mean negative log-probability per token; None where there is none."""
    if result.error or not result.tokens or math.isnan(result.logprob):
        return None
    return round(math.exp(min(-result.logprob / result.tokens, math.log(_HIGHEST))), 4)


def embed(context: StageContext, model: Model, texts: Mapping[str, str], *, stage: str) -> list[Vector]:
    """Returns the embedding of each text, by its id, as records of the stage."""
    with context.open(stage, len(texts)) as open_stage:
        for block in open_stage.blocks(list(texts.items())):
            requests = [Request(context.request_id("embed", id), text) for id, text in block]
            for i, result in by_request(requests, model.embed(requests)):
                vector = "" if result.error else clusters.encode(result.vector)
                open_stage.put(i, Vector(block[i][0], vector, result.error))
    return open_stage.records


def cluster(records: Sequence[Vector], count: int, purpose: str) -> dict[str, int | None]:
    """Returns the cluster of each embedding, by its id. purpose: decides the random numbers, such as "0/1/clusters"."""
    usable = [r for r in records if not r.error]
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")

    def compute() -> list[int]:
        return clusters.k_means(np.stack([clusters.decode(r.vector) for r in usable]), count, seed).tolist()

    # One process decides: sums of another processor may differ in their last bit.
    numbers = distributed.from_primary(compute) if usable else []
    return {**{r.id: None for r in records}, **{r.id: n for r, n in zip(usable, numbers, strict=True)}}
