"""Sizes and shardings of the arrays of decoding: KV caches, slots and packed rows.

Lengths are rounded up to buckets, so that few shapes are compiled.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.attention_blockwise import PACKED_BLOCK
from isheep_jax.model.attention_cached import cache_block
from isheep_jax.model.kv_cache import KVCache, cache_spec, init_cache
from isheep_jax.model.transformer import ForwardSetup
from isheep_jax.sharding import DECODE_RULES, ActivationSharding, batch_sharding, platform_of

# Tokens of a row that holds several prompts, and of one where long rows are better.
ROW_TOKENS = 512
_LONG_ROW_TOKENS = 2048
# Shortest cache rows on accelerators where the number of slots is given: most stages then share their programs.
_GIVEN_CACHE_LENGTH = 2048
# Cache lengths are multiples of this, a multiple of a CPU's tiles, so that caches are read in whole blocks.
_BLOCK = 128
# `attention_splash.LANES`, repeated because importing Pallas takes a while.
_LANES = 128


@dataclass(frozen=True)
class Sizing:
    """What decides the sizes of arrays and the order of calls: the platform, and the devices that hold different rows.

    platform: "cpu", "tpu" or "gpu".
    shards: groups of devices that hold different rows of a batch.
    """

    platform: str
    shards: int

    @classmethod
    def of(cls, mesh: Mesh) -> "Sizing":
        """Returns that of a decode mesh."""
        return cls(platform_of(mesh), data_shards(mesh))

    def aligned(self, tokens: int) -> int:
        """Returns the tokens that a prompt takes in a packed row, in which longer prompts come first.

        So neighbors do not change the order of its sums: on CPUs these go by blocks of `PACKED_BLOCK`, on TPUs by the
        lanes of a register, of which a short prompt takes an aligned part.
        """
        if self.platform == "tpu":
            return min(max(power_of_two(tokens), PACKED_BLOCK), -(-tokens // _LANES) * _LANES)
        return -(-tokens // PACKED_BLOCK) * PACKED_BLOCK

    @property
    def calls_ahead(self) -> int:
        """Calls that are dispatched before the results of one are read. On a CPU program and host share the cores."""
        return 0 if self.platform == "cpu" else 1

    def capacity(self, tokens: int) -> int:
        """Returns the length of the next row where so many tokens of prompts are left to pack.

        Rows of `ROW_TOKENS` keep any arithmetic unit busy, and each prompt's share of the row's attention small, which
        counts on CPUs. Elsewhere each call costs time besides, and longer rows have less padding at their ends.
        """
        if self.platform == "cpu":
            return ROW_TOKENS
        return power_of_two(max(ROW_TOKENS, min(tokens, _LONG_ROW_TOKENS)) // 2 + 1)

    def row_length(self, tokens: int) -> int:
        """Returns the padded length of a packed row; each length is a program of its own.

        A CPU pays for every token of padding, and compiles in seconds. Elsewhere programs take long to compile, and
        short rows leave the arithmetic units idle.
        """
        return bucket_of(tokens, PACKED_BLOCK) if self.platform == "cpu" else power_of_two(max(tokens, ROW_TOKENS))

    def longest_row(self, max_length: int) -> int:
        """Returns the length of the longest row that there can be. max_length: tokens of the longest prompt."""
        return max(self.row_length(max_length), self.capacity(_LONG_ROW_TOKENS))

    def key_limit(self, positions: int) -> int:
        """Returns the `DecodeShape.key_limit` of calls in which no sequence comes to hold more cache positions.

        It is 0 but for GPUs: other devices find the bound without making the host wait. On a GPU it is a number of
        blocks that is a power of two or lies in the middle between two, so that few programs are compiled.
        """
        if self.platform != "gpu":
            return 0
        block = cache_block(self.platform)
        power = power_of_two(max(positions, block))
        between = power // 4 * 3
        return between if positions <= between and between % block == 0 else power

    def prefix_length(self, tokens: int) -> int:
        """Returns the cache positions of a shared prefix, padding included."""
        return bucket_of(tokens, PACKED_BLOCK) if self.platform == "cpu" else power_of_two(max(tokens, _BLOCK))

    def prompts_of_row(self, length: int, prompts: int = 0) -> int:
        """Returns how many prompts the arrays beside a packed row have places for: on a CPU about as many as there are.

        Elsewhere all that fit into a row of this length, so that it has one program.
        """
        return power_of_two(prompts) if self.platform == "cpu" else length // PACKED_BLOCK

    def targets_of_row(self, length: int, targets: int) -> int:
        """Returns how many tokens of texts the arrays beside a packed row have places for.

        On a CPU these are about as many as there are, elsewhere all tokens of the row or a quarter.
        """
        if self.platform == "cpu":
            return power_of_two(targets)
        return length // 4 if targets <= length // 4 else length

    def second_pass(self, tokens: int) -> int:
        """Returns the padded length of a second pass over choices. Devices that multiply fewer wait for the weights."""
        widths = (_LANES, 4 * _LANES) if self.platform != "cpu" else ()
        return next((width for width in widths if tokens <= width), power_of_two(max(tokens, PACKED_BLOCK)))

    def cache_length(self, positions: int, max_length: int, *, more: bool, slots_given: bool) -> int:
        """Returns the length of cache rows that hold the longest known sequence, rounded so that few are compiled.

        Args:
            positions: of that sequence, after the shared prefix.
            max_length: positions of the longest that there can be.
            more: whether other prompts may come; one that is too long for the cache waits until it is empty.
            slots_given: whether the settings say how many slots there are; if not, short rows leave memory for more.
        """
        block = cache_block(self.platform)
        roomy = positions * 5 // 4 if more else positions
        if self.platform == "cpu":
            rounded = bucket_of(roomy, block)
        else:
            rounded = power_of_two(max(roomy, _GIVEN_CACHE_LENGTH if slots_given else block))
        return cache_length(-(-min(rounded, max_length) // block) * block)


def cache_length(tokens: int) -> int:
    """Returns the cache positions, whole blocks, of a row that must hold this number of tokens."""
    return -(-tokens // _BLOCK) * _BLOCK


def bucket_of(length: int, align: int) -> int:
    """Returns the padded length of a row: a power of two; above 256 also the quarters between two powers.

    align: a power of two, the shortest row (tokens).
    """
    power = align
    while power < length:
        power *= 2
    if power <= 256:
        return power
    quarter = power // 8
    return -(-length // quarter) * quarter


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def data_shards(mesh: Mesh) -> int:
    """Returns the number of groups of devices that hold different rows of a batch while decoding."""
    return mesh.shape[DECODE_RULES.batch]


def check_rows(setting: str, rows: int, mesh: Mesh) -> None:
    """Raises `UserError` unless `rows` is a positive multiple of the mesh's data axis."""
    shards = data_shards(mesh)
    if rows < 1 or rows % shards:
        nearest = max(shards, round(rows / shards) * shards)
        raise UserError(f"{setting}={rows} does not divide over {shards} data shards; the nearest that does: {nearest}")


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a KV cache: slots split over data shards, heads over tensor shards."""
    return NamedSharding(mesh, cache_spec(DECODE_RULES))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is that of slots or packed rows."""
    return batch_sharding(mesh, DECODE_RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_cache(cache: KVCache, mesh: Mesh) -> KVCache:
    """Constrains a traced cache to `cache_sharding`."""
    return jax.lax.with_sharding_constraint(cache, cache_sharding(mesh))


def constrain_rows(rows: jax.Array, mesh: Mesh) -> jax.Array:
    """Constrains a traced array to `rows_sharding`."""
    return jax.lax.with_sharding_constraint(rows, rows_sharding(mesh))


def replicate(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Copies a traced array to every device, so that every host can read all of it."""
    return jax.lax.with_sharding_constraint(array, replicated(mesh))


def decode_setup(mesh: Mesh, compute_dtype: jnp.dtype) -> ForwardSetup:
    """Returns the static choices of a forward pass while decoding."""
    return ForwardSetup(compute_dtype, ActivationSharding(mesh, DECODE_RULES), differentiable=False)


@functools.partial(jax.jit, static_argnames=("architecture", "slots", "tokens", "dtype", "mesh"))
def allocate_cache(architecture: Architecture, slots: int, tokens: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """Returns an empty cache, of which each device allocates only its own part.

    Args:
        architecture: the model's.
        slots: rows.
        tokens: tokens that each row must hold.
        dtype: of keys and values.
        mesh: the decode mesh.
    """
    length = cache_length(tokens)
    return constrain_cache(init_cache(architecture, slots, length, dtype, tile=_tile(length, mesh)), mesh)


def abstract_cache(architecture: Architecture, slots: int, tokens: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """Returns the shapes and dtypes of the cache that `allocate_cache` returns for the same arguments."""
    length = cache_length(tokens)
    return jax.eval_shape(lambda: init_cache(architecture, slots, length, dtype, tile=_tile(length, mesh)))


def _tile(length: int, mesh: Mesh) -> int:
    """Returns the cache positions of a tile of rows of a length; 0: a flat cache."""
    platform = platform_of(mesh)
    return 0 if platform == "tpu" else math.gcd(length, cache_block(platform))
