"""Sampling at a temperature with top-k, top-p, min-p and penalties: exact, and without a sort of the vocabulary.

A token is sampled by two inversions of a cumulative distribution: a block of the vocabulary from the sums of all
blocks, then a token of that block. Top-p and min-p use rejection: a sampled token is accepted if it is in the nucleus,
which the summed mass of all more probable tokens decides; otherwise the next try samples from these more probable
tokens only. Every try samples from a set that contains the nucleus, so accepted tokens follow the renormalized nucleus
exactly. A rejection shrinks the mass outside the nucleus to a uniform fraction, so there are at most
1 + log(1 / mass of the nucleus) tries on average, and the most probable token is always accepted. (Rejection with the
rejected token as the next bound: as in FlashInfer, Ye et al. 2025, arXiv 2501.01005.)

Where the vocabulary is sharded, only the sums of blocks and one block per row are communicated.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.decode.requests import SamplingParams

# Most blocks that the vocabulary is cut into; the fewest are 32. No block straddles two shards where the number of
# shards divides the number of blocks.
_BLOCKS = 128
# Bit pattern of 1.0. float32 numbers from 0 to 1 are in the order of their bit patterns, read as integers.
_ONE = 0x3F800000

# Bits of `seen`: the prompt holds the token, the completion holds it.
PROMPT, GENERATED = 1, 2


@flax.struct.dataclass
class DeviceSamplingParams:
    """The numbers of `SamplingParams` as arrays: inputs of the program, so that all stages share one compilation."""

    temperature: jax.typing.ArrayLike = np.float32(1.0)  # 0 takes the most probable token
    top_p: jax.typing.ArrayLike = np.float32(1.0)  # mass of the nucleus; 1 is off
    top_k: jax.typing.ArrayLike = np.int32(0)  # tokens; 0 is off
    min_p: jax.typing.ArrayLike = np.float32(0.0)  # smallest probability relative to the largest; 0 is off
    repetition_penalty: jax.typing.ArrayLike = np.float32(1.0)  # positive; 1 is off
    presence_penalty: jax.typing.ArrayLike = np.float32(0.0)  # logits; 0 is off

    @classmethod
    def from_params(cls, params: SamplingParams) -> "DeviceSamplingParams":
        """Returns the parameters as NumPy scalars of the dtypes of the fields."""
        fields = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        return cls(**{name: dtype(getattr(params, name)) for name, dtype in fields.items()})


def request_key(seed: int, request_id: str) -> np.ndarray:
    """Returns the Threefry key of a request, [2] uint32: a hash of the seed and the id."""
    digest = hashlib.sha256(f"{seed}:{request_id}".encode()).digest()
    return np.frombuffer(digest[:8], dtype=np.uint32)


def without(logits: jax.Array, ranges: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns logits [B, V] with minus infinity in some ranges (from, to) of the vocabulary, which are static."""
    if not ranges:
        return logits
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    inside = functools.reduce(jnp.logical_or, [(token >= begin) & (token < end) for begin, end in ranges])
    return jnp.where(inside, -jnp.inf, logits)


def penalize(logits: jax.Array, sampling: DeviceSamplingParams, seen: jax.Array | None) -> jax.Array:
    """Returns logits [B, V] with the penalties applied. seen: as in `sample`.

    The repetition penalty divides positive logits and multiplies negative ones, for tokens of prompt and completion
    (Keskar et al. 2019, arXiv 1909.05858, section 4.1; by sign as in Hugging Face). The presence penalty is subtracted
    from the logits of tokens of the completion (as in OpenAI's API).
    """
    if seen is None:
        return logits
    penalty = sampling.repetition_penalty
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where((seen & (PROMPT | GENERATED)) != 0, repeated, logits)
    return jnp.where((seen & GENERATED) != 0, logits - sampling.presence_penalty, logits)


def _next_below(weight: jax.Array) -> jax.Array:
    """Returns the next smaller float32 number, at least 0."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.maximum(bits - 1, 0), jnp.float32)


def _raise_floor(weights: jax.Array, k: jax.Array, low: jax.Array) -> jax.Array:
    """Returns the floors of `top_k_floor` as bit patterns [B, 1], by bisection.

    weights: [B, N] float32 from 0 to 1. k: scalar, at least 1. low: [B, 1] int32, bit patterns of numbers that at least
    k weights are above, or 0.
    """

    def narrow(carry):
        # At least k weights are above low (or low is 0), fewer are above high.
        step, low, high, done = carry
        # The answer is most often low itself or just above it, so the first step and every second one look near low.
        middle = jnp.where(step == 0, low, low + (high - low) // jnp.where(step % 2 == 0, 2, 16))
        floor = jax.lax.bitcast_convert_type(middle, jnp.float32)
        above = jnp.sum(weights > floor, axis=-1, keepdims=True, dtype=jnp.int32)
        low, high = jnp.where(above >= k, middle, low), jnp.where(above >= k, high, middle)
        # Once exactly k weights are above low, low moves only to numbers with the same weights above them.
        return step + 1, low, high, done | (above == k) | (high - low <= 1)

    start = 0, low, jnp.full_like(low, _ONE), low < 0
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[-1]), narrow, start)[1]


def top_k_floor(weights: jax.Array, k: jax.Array) -> jax.Array:
    """Returns floors [B, 1]: above a row's floor are exactly its k largest weights and those equal to the k-th.

    weights: [B, V] float32 from 0 to 1, V a multiple of 32. k: scalar, at least 1. A floor is 0 if fewer than k weights
    are positive.
    """
    # The k-th largest of the maxima of groups is a bound from below, found on 1/32 of the data.
    maxima = jnp.max(weights.reshape(weights.shape[0], 32, -1), axis=1)
    low = _raise_floor(maxima, k, jnp.zeros((weights.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(_raise_floor(weights, k, low), jnp.float32)


def _invert(weights: jax.Array, cumulative: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the index [B, 1] where the cumulative sum passes a share of the total.

    Args:
        weights: [B, N].
        cumulative: [B, N], their cumulative sums.
        uniform: [B, 1], the share, [0, 1).
    """
    # By rounding, the sum may pass at a weight of 0, or only there.
    passed = (cumulative > uniform * cumulative[:, -1:]) & (weights > 0)
    index = jnp.where(
        jnp.any(passed, axis=-1, keepdims=True),
        jnp.argmax(passed, axis=-1, keepdims=True),
        jnp.argmax(weights, axis=-1, keepdims=True),
    )
    return index.astype(jnp.int32)


def _sample_from(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, sampling: DeviceSamplingParams, mesh: Mesh
) -> jax.Array:
    """Returns `sample` at a positive temperature, without penalties; arguments as there."""
    rows, vocabulary = logits.shape

    def whole_rows(array):
        # Otherwise the compiler shards these small arrays over the vocabulary's axis, with dozens of small collectives.
        spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, *[None] * (array.ndim - 1))
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature)
    if math.gcd(vocabulary, _BLOCKS) < 32:
        weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCKS)))
    blocks = math.gcd(weights.shape[1], _BLOCKS)
    blocked = weights.reshape(rows, blocks, -1)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl="threefry2x32"), positions)

    def sums_above(floor):
        return whole_rows(jnp.sum(jnp.where(blocked > floor[:, :, None], blocked, 0.0), axis=-1))

    def sample_above(floor, sums, cumulative, tries):
        """Samples a token whose weight is above floor; returns its index and its weight, both [B, 1]."""
        uniforms = whole_rows(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, tries), (2,)))(keys))
        block = _invert(sums, cumulative, uniforms[:, :1])
        inside = whole_rows(jnp.take_along_axis(blocked, block[:, :, None], axis=1)[:, 0])
        inside = jnp.where(inside > floor, inside, 0.0)
        index = _invert(inside, jnp.cumsum(inside, axis=-1), uniforms[:, 1:])
        return block * blocked.shape[2] + index, jnp.take_along_axis(inside, index, axis=1)

    def top_k_sums():
        floor = top_k_floor(weights, sampling.top_k)
        return floor, sums_above(floor)

    def all_sums():
        return jnp.zeros((rows, 1), jnp.float32), whole_rows(jnp.sum(blocked, axis=-1))

    floor, sums = jax.lax.cond(sampling.top_k > 0, top_k_sums, all_sums)
    cumulative = jnp.cumsum(sums, axis=-1)
    mass = jnp.where(sampling.top_p < 1.0, sampling.top_p * cumulative[:, -1:], jnp.inf)
    min_p_floor = _next_below(jnp.minimum(sampling.min_p, 1.0).astype(jnp.float32))
    filtered = (sampling.top_p < 1.0) | (sampling.min_p > 0.0)

    def attempt(carry):
        tries, token, floor, pending = carry  # floor: the token's weight, but at least `min_p_floor`
        sums = sums_above(floor)
        # The total is the last cumulative sum, because XLA makes a sum of sums one more pass over the weights.
        cumulative = jnp.cumsum(sums, axis=-1)
        more_probable = cumulative[:, -1:]
        # The most probable token is always accepted, and any token if logits are NaN, as nothing is above a floor.
        rejected = pending & (more_probable > 0.0) & ((floor <= min_p_floor) | (more_probable >= mass))
        resampled, weight = sample_above(floor, sums, cumulative, tries)
        token = jnp.where(rejected, resampled, token)
        return tries + 1, token, jnp.where(rejected, jnp.maximum(weight, min_p_floor), floor), rejected

    token, weight = sample_above(floor, sums, cumulative, 0)
    start = 1, token, jnp.maximum(weight, min_p_floor), jnp.broadcast_to(filtered, token.shape)
    _, token, _, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[-1]), attempt, start)
    return jnp.minimum(token[:, 0], vocabulary - 1)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    sampling: DeviceSamplingParams,
    seen: jax.Array | None = None,
    *,
    mesh: Mesh,
) -> jax.Array:
    """Samples one token per row, [B] int32, which depends on the row's own logits, key, position and `seen` alone.

    Penalties come first, then the temperature, then the filters, each of which sets a smallest probability: top-k keeps
    the k most probable tokens; top-p keeps the fewest most probable of these that hold top_p of their mass (Holtzman et
    al. 2020, arXiv 1904.09751, section 3.1); min-p keeps what is at least min_p times as probable as the most probable
    token (Nguyen et al. 2024, arXiv 2407.01082). Tokens of equal probability are kept or dropped together, and the most
    probable ones are always kept. A token less than 1e-30 times as probable as these is sampled only where a filter is
    off.

    Args:
        logits: [B, V] float32.
        keys: [B, 2] uint32, from `request_key`.
        positions: [B] int32, the token's position in its sequence.
        sampling: parameters of all rows.
        seen: [B, V] uint8, the bits `PROMPT` and `GENERATED` of each token; None: without penalties.
        mesh: may shard the rows and the vocabulary.
    """
    return jax.lax.cond(
        sampling.temperature > 0.0,
        lambda: _sample_from(penalize(logits, sampling, seen), keys, positions, sampling, mesh),
        lambda: jnp.argmax(penalize(logits, sampling, seen), axis=-1).astype(jnp.int32),
    )


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns log-probabilities [B] float32 of tokens [B] int32 under logits [B, V] float32."""
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - top - jnp.log(total)
