"""Attention of decode steps on TPUs: a kernel that reads each sequence's keys as far as it goes and writes new ones.

XLA would read all sequences as far as the longest, and scatter the new keys and values row by row. (A kernel of this
kind for caches in pages: Jiang et al. 2026, arXiv 2604.15464. Splitting the softmax over blocks: Milakov and
Gimelshein 2018.)

L layers, B rows, R rows of a call of the kernel, S cache positions, C cache positions of a block, P blocks that are
computed at a time, N query heads, K key-value heads, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from isheep_jax.model.attention_cached import DECODE_KERNEL
from isheep_jax.model.attention_reference import MASKED, NO_WINDOW, AttentionConfig, Partial
from isheep_jax.model.attention_splash import LANES
from isheep_jax.model.kv_cache import CacheWrite, KVCache, cache_spec
from isheep_jax.sharding import ActivationSharding

# Rows of a vector register, of 32 bits.
_SUBLANES = 8
# Cache positions of a block, and of one of wide keys. A longer one reads more keys behind a sequence's end, a shorter
# one takes more copies: with 256 positions of 128 dimensions the kernel's instructions take 55 to 98 % of the time that
# the copies take (the compiler's bundles on a v4, a v5e and a v6e).
_BLOCK, _WIDE_BLOCK = 256, 128
# Blocks that are computed at a time, so that the arithmetic of one fills the waits of another.
_TOGETHER = 4
# Cache positions that are read and written around a new one: whole registers of 16 bits or 32.
_WRITTEN = 16
# Bytes of a core's own memory for what a call of the kernel has of its rows.
_ROWS_BYTES = 6 * 2**20
# Of the product of two matrices over the last axis of both.
_LAST_AXES = (((1,), (1,)), ((), ()))


def kernel_refusal(cache: KVCache, sharding: ActivationSharding) -> str | None:
    """Returns why the kernel cannot serve a cache of all layers, split as `sharding` says, or None if it can."""
    if cache.k_scale is not None:
        return "it reads no integers"
    if cache.tile:
        return "it reads no tiles"
    width = cache.k.shape[3] // sharding.mesh.shape[sharding.rules.kv_heads]
    if width % LANES:
        return f"a device's keys have a multiple of {LANES} dimensions, not {width}"
    return None


def block_length(cache_length: int, width: int) -> int:
    """Returns the cache positions that are read at a time. width: dimensions of a device's keys, K * H."""
    return math.gcd(cache_length, _BLOCK if width <= 2 * LANES else _WIDE_BLOCK)


def kernel_cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    write: CacheWrite,
    layer: jax.Array,
    config: AttentionConfig,
    window: jax.Array | int | None,
    sharding: ActivationSharding,
    *,
    interpret: bool = False,
) -> tuple[Partial, KVCache]:
    """Returns attention of each row's token to itself and the row's earlier cache positions, and the cache with it.

    Args:
        q: [B, 1, N, H].
        k: [B, 1, K, H], the tokens' keys.
        v: [B, 1, K, H], their values.
        write: the cache of all layers, flat floats, and the tokens' positions in it; at others a row sees nothing and
            writes nothing.
        layer: scalar, the layer's number.
        config: scale and softcap.
        window: of the layer.
        sharding: B is split over the batch's mesh axes, N and K over those of the heads.
        interpret: runs without a TPU, slowly.
    """
    rules, cache = sharding.rules, write.cache
    scale = 1 / math.sqrt(q.shape[3]) if config.scale is None else config.scale
    layer_and_window = jnp.stack([layer, NO_WINDOW if window is None else window]).astype(jnp.int32)
    heads = PartitionSpec(rules.batch, None, rules.heads, None)
    partial = PartitionSpec(rules.batch, rules.heads, None, None)
    split = cache_spec(rules)
    run = jax.shard_map(
        functools.partial(_attend_local, scale=scale, softcap=config.softcap, interpret=interpret),
        mesh=sharding.mesh,
        in_specs=(heads, heads, heads, split, split, PartitionSpec(), PartitionSpec(rules.batch)),
        out_specs=(Partial(partial, partial, PartitionSpec(*partial, None)), split, split),
        # Kernels do not say how their results vary over the mesh.
        check_vma=False,
    )
    at = write.positions[:, 0]
    at = jnp.where(at < cache.length, at, -1)
    attended, *written = run(q, k, v, cache.k, cache.v, layer_and_window, at)
    itself = (at >= 0)[:, None, None]
    return attended.update(q, k, v, itself, config), KVCache(*written)


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    layer_and_window: jax.Array,
    last: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> tuple[Partial, jax.Array, jax.Array]:
    """Returns attention of one device's rows and heads to what was in the cache, and the cache with the new tokens.

    Args:
        q: [B, 1, N, H].
        k: [B, 1, K, H].
        v: [B, 1, K, H].
        k_cache: [L, B, S, K * H].
        v_cache: [L, B, S, K * H].
        layer_and_window: [2].
        last: [B], the tokens' cache positions.
        scale: of the logits.
        softcap: of the logits.
        interpret: runs without a TPU.
    """
    B, _, N, H = q.shape
    K, width, dtype = k.shape[2], k_cache.shape[3], k_cache.dtype
    heads = -(-N // _SUBLANES) * _SUBLANES
    block = block_length(k_cache.shape[2], width)
    R = _rows_of_call(B, heads, H, width)
    q = jnp.pad(q[:, 0], ((0, 0), (0, heads - N), (0, 0)))
    k, v = (x.reshape(B, 1, width).astype(dtype) for x in (k, v))

    def of_rows(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((R, *shape), lambda i, *_: (i, 0, 0))

    whole = pl.BlockSpec(memory_space=pl.ANY)
    statistic = jax.ShapeDtypeStruct((B, heads, LANES), jnp.float32)
    maximum, total, acc, k_cache, v_cache = pl.pallas_call(
        functools.partial(_kernel, kv_heads=K, group=N // K, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B // R,),
            in_specs=[of_rows(heads, H), of_rows(1, width), of_rows(1, width), whole, whole],
            out_specs=[of_rows(heads, LANES), of_rows(heads, LANES), of_rows(heads, H), whole, whole],
            scratch_shapes=[
                pltpu.VMEM((2, 2, _TOGETHER, block, width), dtype),
                pltpu.VMEM((2, R, _WRITTEN, width), dtype),
                pltpu.SMEM((2, _TOGETHER, 3), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            statistic,
            statistic,
            jax.ShapeDtypeStruct((B, heads, H), jnp.float32),
            jax.ShapeDtypeStruct(k_cache.shape, dtype),
            jax.ShapeDtypeStruct(v_cache.shape, dtype),
        ],
        # The caches, after the two prefetched arrays and three of rows.
        input_output_aliases={5: 3, 6: 4},
        # Where a chip has two cores, each takes half of the calls.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        interpret=interpret,
        name=DECODE_KERNEL,
    )(layer_and_window, last, q, k, v, k_cache, v_cache)
    maximum, total = (x[:, :N, 0].reshape(B, K, N // K, 1) for x in (maximum, total))
    return Partial(maximum, total, acc[:, :N].reshape(B, K, N // K, 1, H)), k_cache, v_cache


def _rows_of_call(rows: int, heads: int, head_dim: int, width: int) -> int:
    """Returns how many rows a call of the kernel takes: a divisor of `rows`, at most half of them.

    Args:
        rows: of a device.
        heads: query heads of a device.
        head_dim: H.
        width: K * H of a device.
    """
    lanes = -(-head_dim // LANES) * LANES
    # Statistics, sums and queries are there twice, for one call and for the next; so are new keys and values.
    row_bytes = 2 * heads * (2 * LANES * 4 + lanes * 4 + lanes * 2) + 3 * 2 * _WRITTEN * width * 2
    most = max(1, min(_ROWS_BYTES // row_bytes, rows // 2))
    return next(count for count in range(most, 0, -1) if rows % count == 0)


def _kernel(
    layer_and_window_ref,
    last_ref,
    q_ref,
    k_ref,
    v_ref,
    old_k_ref,
    old_v_ref,
    max_ref,
    sum_ref,
    acc_ref,
    k_cache_ref,
    v_cache_ref,
    blocks_ref,
    written_ref,
    pairs_ref,
    read_sems,
    write_sems,
    *,
    kv_heads: int,
    group: int,
    scale: float,
    softcap: float | None,
):
    """Attends from R rows to their cache positions before `last`, and writes the new keys and values there.

    The blocks of all rows are one list, of which P are computed while the next P are copied from the cache.

    Args:
        layer_and_window_ref: [2].
        last_ref: [B].
        q_ref: [R, N, H].
        k_ref: [R, 1, K * H].
        v_ref: [R, 1, K * H].
        old_k_ref: the cache [L, B, S, K * H], in the chip's large memory.
        old_v_ref: likewise.
        max_ref: [R, N, lanes], the same in all lanes.
        sum_ref: [R, N, lanes].
        acc_ref: [R, N, H].
        k_cache_ref: the same memory as `old_k_ref`.
        v_cache_ref: the same memory as `old_v_ref`.
        blocks_ref: [2, 2, P, C, K * H], blocks of keys and of values, for this turn and for the next.
        written_ref: [2, R, written, K * H], what is around the new keys and values.
        pairs_ref: [2, P, 3], of each block its row, its number, and the first position that is not seen.
        read_sems: [2], of copies of blocks.
        write_sems: [2], of copies to and from `written_ref`.
        kv_heads: K.
        group: N / K.
        scale: of the logits.
        softcap: of the logits.
    """
    R, heads, H = acc_ref.shape
    block = blocks_ref.shape[3]
    shift = block.bit_length() - 1
    start = pl.program_id(0) * R
    layer, window = layer_and_window_ref[0], layer_and_window_ref[1]
    olds, caches, news = (old_k_ref, old_v_ref), (k_cache_ref, v_cache_ref), (k_ref, v_ref)

    def last(row):
        return last_ref[start + jnp.minimum(row, R - 1)]

    def first_block(row):
        return jnp.maximum(last(row) - window + 1, 0) >> shift

    def end_block(row):
        return (last(row) + block - 1) >> shift

    def for_active_rows(do):
        def for_row(row, _):
            pl.when(last(row) >= 0)(lambda: do(row))
            return 0

        jax.lax.fori_loop(0, R, for_row, 0)

    def around(row, is_write):
        """Returns the copies between `written_ref` and the cache around a row's new position."""
        at = pl.ds(pl.multiple_of(last(row) & -_WRITTEN, _WRITTEN), _WRITTEN)
        pairs = ((cache.at[layer, start + row, at], written_ref.at[i, row]) for i, cache in enumerate(caches))
        if is_write:
            return [pltpu.make_async_copy(here, there, write_sems.at[1]) for there, here in pairs]
        return [pltpu.make_async_copy(there, here, write_sems.at[0]) for there, here in pairs]

    def each_copy(method, is_write):
        def do(row):
            for copy in around(row, is_write):
                getattr(copy, method)()

        return do

    def insert(row):
        offset = last(row) & (_WRITTEN - 1)
        is_new = jax.lax.broadcasted_iota(jnp.int32, written_ref.shape[2:], 0) == offset
        for i, new in enumerate(news):
            written_ref[i, row] = jnp.where(is_new, new[row], written_ref[i, row])
        each_copy("start", True)(row)

    def block_copies(turn, p, row, number):
        at = pl.ds(pl.multiple_of(number * block, block), block)
        return [
            pltpu.make_async_copy(old.at[layer, start + row, at], blocks_ref.at[turn, i, p], read_sems.at[turn])
            for i, old in enumerate(olds)
        ]

    def skip_empty(row, number):
        """Returns the row and number of the block at or after one that may lie behind the end of its row."""
        return jax.lax.while_loop(
            lambda at: (at[0] < R) & (at[1] >= end_block(at[0])),
            lambda at: (at[0] + 1, first_block(at[0] + 1)),
            (row, number),
        )

    def fetch(turn, at):
        """Starts copies of the next P blocks; returns what is behind them. Past the last it copies any, unseen."""
        for p in range(_TOGETHER):
            row, number = skip_empty(*at)
            is_block = row < R
            at = row, number + 1
            row, number = jnp.minimum(row, R - 1), jnp.where(is_block, number, 0)
            pairs_ref[turn, p, 0], pairs_ref[turn, p, 1] = row, number
            pairs_ref[turn, p, 2] = jnp.where(is_block, last(row), 0)
            for copy in block_copies(turn, p, row, number):
                copy.start()
        return at

    def attend(turn, p):
        """Returns the statistics [N, 1] twice and the sum [N, H] of a block."""
        row, number, end = (pairs_ref[turn, p, i] for i in range(3))
        k, v = blocks_ref[turn, 0, p], blocks_ref[turn, 1, p]
        # With zeros in the place of other heads, one product with all heads' keys gives all logits.
        q = jnp.concatenate([jnp.where(is_own, q_ref[row], 0) for is_own in own_heads], axis=1)
        logits = jax.lax.dot_general(q, k.astype(q.dtype), _LAST_AXES, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        position = number * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        visible = (position < end) & (position > end - window)
        logits = jnp.where(visible, logits, MASKED)
        maximum = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(logits - maximum), 0.0)
        all_heads = jnp.dot(weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32)
        acc = sum(jnp.where(own, all_heads[:, i * H : (i + 1) * H], 0.0) for i, own in enumerate(own_heads))
        return maximum, jnp.sum(weights, axis=1, keepdims=True), acc

    def merge(row, maximum, total, acc):
        old = max_ref[row][:, :1]
        new = jnp.maximum(old, maximum)
        a, b = jnp.exp(old - new), jnp.exp(maximum - new)
        max_ref[row] = jnp.broadcast_to(new, max_ref.shape[1:])
        sum_ref[row] = jnp.broadcast_to(a * sum_ref[row][:, :1] + b * total, sum_ref.shape[1:])
        acc_ref[row] = a * acc_ref[row] + b * acc

    def take_turn(i, at):
        turn = i & 1
        at = jax.lax.cond(i + 1 < turns, lambda: fetch(1 - turn, at), lambda: at)
        for p in range(_TOGETHER):
            for copy in block_copies(turn, p, pairs_ref[turn, p, 0], pairs_ref[turn, p, 1]):
                copy.wait()
        for p, block_of in enumerate([attend(turn, p) for p in range(_TOGETHER)]):
            merge(pairs_ref[turn, p, 0], *block_of)
        return at

    own_heads = [jax.lax.broadcasted_iota(jnp.int32, (heads, H), 0) // group == i for i in range(kv_heads)]
    blocks = jax.lax.fori_loop(0, R, lambda row, n: n + jnp.maximum(end_block(row) - first_block(row), 0), 0)
    turns = pl.cdiv(blocks, _TOGETHER)
    for_active_rows(each_copy("start", False))
    at = 0, first_block(0)
    at = jax.lax.cond(turns > 0, lambda: fetch(0, at), lambda: at)
    max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    for_active_rows(each_copy("wait", False))
    for_active_rows(insert)
    jax.lax.fori_loop(0, turns, take_turn, at)
    for_active_rows(each_copy("wait", True))
