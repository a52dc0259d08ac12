"""Which seeds a prompt for new instructions shows: random ones, ones that are near to one another, or diverse ones."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isheep_jax.errors import UserError
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters import clusters
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.ways import ways_of
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import user_text
from isheep_jax.loop.stages import measure

# Random seeds among which diverse ones are chosen, per seed to choose: all of them would make every prompt show the
# same outliers.
_CANDIDATES = 4


@dataclass(frozen=True)
class SeedPool:
    """The seeds that prompts may show. vectors: their embeddings [N, D] of length 1, where the choice looks at them."""

    seeds: Sequence[Seed]
    vectors: np.ndarray | None = None

    def similarities(self, index: int, others: Sequence[int]) -> np.ndarray:
        """Returns the cosine [M] of a seed with each of the others."""
        # Rounded: sums of another processor may differ in their last bits.
        return (self.vectors[others] @ self.vectors[index]).round(6)


def seed_pool(context: StageContext, writer: Model) -> SeedPool:
    """Returns the seeds, embedded by the writer where `synthesize.choose` needs it.

    Raises UserError where too few seeds fit the context.
    """
    settings = context.config.synthesize
    if settings.choose == "random":
        return SeedPool(context.seeds)
    texts = {s.id: user_text(s.instruction, s.input) for s in context.seeds}
    records = measure.embed(context, writer, texts, stage="pool")
    vectors = {r.id: clusters.decode(r.vector).astype(np.float64) for r in records if r.id in texts and not r.error}
    seeds = [s for s in context.seeds if s.id in vectors]
    shots = max(way.shots for way in ways_of(settings))
    if len(seeds) < shots:
        raise UserError(
            f"synthesize.seeds: only {len(seeds)} seeds fit the context, but a prompt shows {shots}; "
            "raise decode.max_length or shorten the seeds"
        )
    # What all hidden states have in common would hide the differences.
    centered = np.stack([vectors[s.id] for s in seeds])
    centered -= centered.mean(axis=0)
    return SeedPool(seeds, centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12))


def choose_seeds(context: StageContext, pool: SeedPool, number: int, shots: int) -> list[Seed]:
    """Returns the seeds that the prompt with this number shows, all different."""
    rng = context.random("synthesize", number)
    return [pool.seeds[i] for i in _CHOICES[context.config.synthesize.choose](pool, rng, shots)]


def _random(pool: SeedPool, rng: random.Random, shots: int) -> list[int]:
    return rng.sample(range(len(pool.seeds)), shots)


def _nearest(pool: SeedPool, rng: random.Random, shots: int) -> list[int]:
    """Returns a random seed last, next to the text to be written, and those nearest to it before it."""
    anchor = rng.randrange(len(pool.seeds))
    others = [i for i in range(len(pool.seeds)) if i != anchor]
    order = np.argsort(-pool.similarities(anchor, others), kind="stable")[: shots - 1]
    return [*(others[i] for i in reversed(order.tolist())), anchor]


def _diverse(pool: SeedPool, rng: random.Random, shots: int) -> list[int]:
    """Returns seeds each of which is, among random candidates, the least similar to those before it."""
    first, *candidates = rng.sample(range(len(pool.seeds)), min(len(pool.seeds), _CANDIDATES * shots))
    chosen = [first]
    nearest = np.full(len(candidates), -1.0)
    while len(chosen) < shots:
        nearest = np.maximum(nearest, pool.similarities(chosen[-1], candidates))
        least = int(np.argmin(nearest))
        chosen.append(candidates[least])
        nearest[least] = np.inf
    return chosen


_CHOICES: dict[str, Callable[[SeedPool, random.Random, int], list[int]]] = {
    "random": _random,
    "nearest": _nearest,
    "diverse": _diverse,
}
