"""Sampling at a temperature with top-k, top-p, min-p and penalties: exact, and without a sort of the vocabulary.

A token is drawn by two inversions of a cumulative distribution: a block of the vocabulary from the sums of all blocks,
then a token of that block. Top-p and min-p reject: a drawn token is accepted if it is in the nucleus, for which the
mass of all more probable tokens is summed. Else the next try draws from those more probable tokens only. Every try
draws from a set that holds the nucleus, so that accepted tokens follow the renormalized nucleus exactly. A rejection
shrinks the mass outside the nucleus to a uniform fraction, so that there are at most 1 + log(1 / mass of the nucleus)
tries on average, and the most probable token is always accepted. (Rejection with the rejected token as the next bound:
as in FlashInfer, Ye et al. 2025, arXiv 2501.01005.)

Where the vocabulary is sharded, only the sums of blocks and one block per row travel.
"""

import hashlib
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The vocabulary is cut into so many blocks at most, and into 32 at least: none straddles two shards where the number
# of shards divides that.
_BLOCKS = 128
# Bit pattern of 1.0: float32 numbers from 0 to 1 are in the order of their bit patterns, read as integers.
_ONE = 0x3F800000

PROMPT, GENERATED = 1, 2  # bits of `seen`


@flax.struct.dataclass
class DeviceSamplingParams:
    """Scalars: data and not part of the program, so that stages share one compilation. float32, but top_k is int32.

    temperature: 0 takes the most probable token. top_p: mass of the nucleus; 1 is off. top_k (tokens): 0 is off. min_p:
    smallest probability relative to the largest; 0 is off. repetition_penalty: positive; 1 is off. presence_penalty
    (logits): 0 is off.
    """

    temperature: jax.typing.ArrayLike = np.float32(1.0)
    top_p: jax.typing.ArrayLike = np.float32(1.0)
    top_k: jax.typing.ArrayLike = np.int32(0)
    min_p: jax.typing.ArrayLike = np.float32(0.0)
    repetition_penalty: jax.typing.ArrayLike = np.float32(1.0)
    presence_penalty: jax.typing.ArrayLike = np.float32(0.0)


def request_key(seed: int, request_id: str) -> np.ndarray:
    """Threefry key [2] (uint32) of a request: a hash of the seed and the id."""
    digest = hashlib.sha256(f"{seed}:{request_id}".encode()).digest()
    return np.frombuffer(digest[:8], dtype=np.uint32)


def penalize(logits: jax.Array, settings: DeviceSamplingParams, seen: jax.Array | None) -> jax.Array:
    """Logits [B, V] after the penalties. seen: as in `sample`.

    The repetition penalty divides positive logits and multiplies negative ones, of tokens of the prompt and of the
    answer (Keskar et al. 2019, arXiv 1909.05858, section 4.1; by sign as in Hugging Face). The presence penalty is
    subtracted from the logits of tokens of the answer (as in OpenAI's API).
    """
    if seen is None:
        return logits
    penalty = settings.repetition_penalty
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where((seen & (PROMPT | GENERATED)) != 0, repeated, logits)
    return jnp.where((seen & GENERATED) != 0, logits - settings.presence_penalty, logits)


def _next_below(weight: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.maximum(bits - 1, 0), jnp.float32)


def _raise_floor(weights: jax.Array, k: jax.Array, low: jax.Array) -> jax.Array:
    # Bisection on bit patterns [B, 1]: at least k weights are above low (or low is 0), fewer are above high.

    def narrow(carry):
        step, low, high, done = carry
        # The first bound is most often the best, or just below it: look there first, then at every second step.
        middle = jnp.where(step == 0, low, low + (high - low) // jnp.where(step % 2 == 0, 2, 16))
        floor = jax.lax.bitcast_convert_type(middle, jnp.float32)
        above = jnp.sum(weights > floor, axis=-1, keepdims=True, dtype=jnp.int32)
        low, high = jnp.where(above >= k, middle, low), jnp.where(above >= k, high, middle)
        # Once exactly k weights are above low, low moves only to numbers with the same weights above them.
        return step + 1, low, high, done | (above == k) | (high - low <= 1)

    start = 0, low, jnp.full_like(low, _ONE), low < 0
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[-1]), narrow, start)[1]


def top_k_floor(weights: jax.Array, k: jax.Array) -> jax.Array:
    """A number that the k largest weights of each row, and those equal to the k-th, are above, and no others.

    weights: [B, V] float32 from 0 to 1, V a multiple of 32. k: scalar, at least 1. Returns [B, 1]; 0 where less than k
    weights are positive.
    """
    # The k-th largest of the maxima of groups is a bound from below, found on 1/32 of the data.
    maxima = jnp.max(weights.reshape(weights.shape[0], 32, -1), axis=1)
    low = _raise_floor(maxima, k, jnp.zeros((weights.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(_raise_floor(weights, k, low), jnp.float32)


def _invert(weights: jax.Array, cumulative: jax.Array, uniform: jax.Array) -> jax.Array:
    # weights and their cumulative sums: [B, N]. uniform: [B, 1] in [0, 1). Returns where the sum passes, [B, 1].
    # Rounding may let the sum pass at a weight of 0, or only there.
    passed = (cumulative > uniform * cumulative[:, -1:]) & (weights > 0)
    index = jnp.where(
        jnp.any(passed, axis=-1, keepdims=True),
        jnp.argmax(passed, axis=-1, keepdims=True),
        jnp.argmax(weights, axis=-1, keepdims=True),
    )
    return index.astype(jnp.int32)


def _from_distribution(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, settings: DeviceSamplingParams, mesh: Mesh | None
) -> jax.Array:
    rows, vocabulary = logits.shape

    def whole_rows(array):
        # Else the compiler shards these small arrays over the vocabulary's axis, with dozens of small collectives.
        if mesh is None:
            return array
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, *[None] * (array.ndim - 1))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / settings.temperature)
    if math.gcd(vocabulary, _BLOCKS) < 32:
        weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCKS)))
    blocks = math.gcd(weights.shape[1], _BLOCKS)
    blocked = weights.reshape(rows, blocks, -1)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl="threefry2x32"), positions)

    def sums_above(floor):
        return whole_rows(jnp.sum(jnp.where(blocked > floor[:, :, None], blocked, 0.0), axis=-1))

    def draw(floor, sums, cumulative, tries):
        # The index and the weight [B, 1] of a token whose weight is above floor.
        uniforms = whole_rows(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, tries), (2,)))(keys))
        block = _invert(sums, cumulative, uniforms[:, :1])
        inside = whole_rows(jnp.take_along_axis(blocked, block[:, :, None], axis=1)[:, 0])
        inside = jnp.where(inside > floor, inside, 0.0)
        place = _invert(inside, jnp.cumsum(inside, axis=-1), uniforms[:, 1:])
        return block * blocked.shape[2] + place, jnp.take_along_axis(inside, place, axis=1)

    def of_top_k():
        floor = top_k_floor(weights, settings.top_k)
        return floor, sums_above(floor)

    def of_all():
        return jnp.zeros((rows, 1), jnp.float32), whole_rows(jnp.sum(blocked, axis=-1))

    floor, sums = jax.lax.cond(settings.top_k > 0, of_top_k, of_all)
    cumulative = jnp.cumsum(sums, axis=-1)
    mass = jnp.where(settings.top_p < 1.0, settings.top_p * cumulative[:, -1:], jnp.inf)
    least = _next_below(jnp.minimum(settings.min_p, 1.0).astype(jnp.float32))
    filtered = (settings.top_p < 1.0) | (settings.min_p > 0.0)

    def attempt(carry):
        tries, token, floor, pending = carry  # floor: the token's weight, but at least `least`
        sums = sums_above(floor)
        # The total is the last cumulative sum, because XLA makes a sum of sums one more pass over the weights.
        cumulative = jnp.cumsum(sums, axis=-1)
        more_probable = cumulative[:, -1:]
        # The most probable token stays, and so does any where logits are no numbers, of which nothing is above a floor.
        rejected = pending & (more_probable > 0.0) & ((floor <= least) | (more_probable >= mass))
        other, weight = draw(floor, sums, cumulative, tries)
        token = jnp.where(rejected, other, token)
        return tries + 1, token, jnp.where(rejected, jnp.maximum(weight, least), floor), rejected

    token, weight = draw(floor, sums, cumulative, 0)
    start = 1, token, jnp.maximum(weight, least), jnp.broadcast_to(filtered, token.shape)
    _, token, _, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[-1]), attempt, start)
    return jnp.minimum(token[:, 0], vocabulary - 1)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    settings: DeviceSamplingParams,
    seen: jax.Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> jax.Array:
    """One token per row.

    logits: [B, V] float32. keys: [B, 2] uint32 from `request_key`. positions: [B] int32, where the token will stand in
    its sequence. seen: [B, V] uint8, `PROMPT` and `GENERATED` by token; None: without penalties. mesh: where the
    rows and the vocabulary may be sharded. Returns [B] int32.

    Penalties come first, then the temperature, then the filters, each a smallest probability: top-k takes the k most
    probable tokens; top-p takes of these the fewest most probable that hold top_p of their mass (Holtzman et al. 2020,
    arXiv 1904.09751, section 3.1); min-p takes what is at least min_p times as probable as the most probable token
    (Nguyen et al. 2024, arXiv 2407.01082). Tokens of equal probability are in or out together. The most probable are
    always in. A token less than 1e-30 times as probable as these may be drawn where a filter is off only.

    A row's token depends on its own logits, key, position and bits of `seen`.
    """
    return jax.lax.cond(
        settings.temperature > 0.0,
        lambda: _from_distribution(penalize(logits, settings, seen), keys, positions, settings, mesh),
        lambda: jnp.argmax(penalize(logits, settings, seen), axis=-1).astype(jnp.int32),
    )


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logarithms of the tokens' probabilities: logits [B, V] float32, tokens [B] int32; returns [B] float32.

    Of the logits as they are, without temperature, filters and penalties.
    """
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - top - jnp.log(total)
