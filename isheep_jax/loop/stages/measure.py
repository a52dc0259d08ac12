"""Measures what some selection rules need besides readings: clusters of instructions."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from isheep_jax import distributed
from isheep_jax.decode.requests import Request
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.filters import clusters
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Pair, Vector, user_text
from isheep_jax.loop.selection.rules import needs_clusters


def measure(context: StageContext, judge: Model, pairs: Sequence[Pair]) -> dict[str, int | None]:
    """Returns the cluster of each instruction of the (kept) pairs, by its id; nothing where no rule looks at it."""
    if not needs_clusters(context.config):
        return {}
    texts = {p.instruction_id: user_text(p.instruction, p.input) for p in pairs}
    vectors = embed(context, judge, texts, stage="vectors")
    purpose = f"{context.config.seed}/{context.request_id('clusters', context.turn)}"
    return cluster(vectors, context.config.select.clusters, purpose)


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
