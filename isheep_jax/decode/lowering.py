"""Lowers the programs of decoding and scoring on abstract arrays, as the engine calls them: to compile them ahead.

A program that was compiled for abstract arrays is found again, in memory or in the cache of compiled programs, by the
call with arrays of the same sizes. The sizes are those that `Sizing` rounds to.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from isheep_jax.decode.cache import (
    Sizing,
    abstract_cache,
    allocate_cache,
    cache_sharding,
    replicated,
    rows_sharding,
)
from isheep_jax.decode.choice_logprobs import COLUMNS as SECOND_COLUMNS
from isheep_jax.decode.choice_logprobs import SECOND_PASS_TOKENS, second_logprobs
from isheep_jax.decode.packing import COLUMNS
from isheep_jax.decode.prefill import Prefix, make_prefix, prefill, prefix_sharding
from isheep_jax.decode.prefill_logprobs import packed_logprobs
from isheep_jax.decode.programs import DecodeShape, compile_decode_steps, weight_formats
from isheep_jax.decode.text_logprobs import segment_means, token_logprobs
from isheep_jax.model.kv_cache import KVCache, init_cache
from isheep_jax.model.quantization import abstract_weights

# Tokens after a prefix without which no prompt fits: its own last one, and what follows it.
_LEAST_ROOM = 2


@dataclass(frozen=True)
class Program:
    """A program that can be compiled ahead.

    name: what it does, at which sizes.
    usual: whether its sizes are those of most prompts.
    """

    name: str
    compile: Callable[[], object]
    usual: bool = True


@dataclass(frozen=True)
class DecodingPrograms:
    """The programs of one model, whose weights need not be there.

    nominal: the shape whose program decides how the weights are stored; it has the number of slots.
    max_length: the most tokens of a prompt with what follows it.
    """

    nominal: DecodeShape
    max_length: int

    def settle(self) -> None:
        """Compiles what decides how the weights are stored, on which all other programs depend."""
        self._params  # noqa: B018

    def of_settings(self) -> Program:
        """Returns the decode program of the settings: all slots at their full length, no prefix."""
        name = f"decode {self.nominal.slots} slots of {self.nominal.cache_length} tokens"
        return Program(name, functools.partial(compile_decode_steps, self.nominal, self.nominal))

    def generate(self, prefix: int, max_tokens: int) -> Iterator[Program]:
        """Yields the programs that complete prompts.

        Args:
            prefix: tokens that all prompts begin with; 0: they share none.
            max_tokens: the most new tokens of a completion.
        """
        room = self.max_length - prefix
        if room < _LEAST_ROOM:
            return
        yield from self._prefix_programs(prefix)
        positions, abstract_prefix = self._prefix(prefix)
        least = min(max_tokens + 1, room)
        caches = {
            self._sizing.cache_length(n, room, more=bool(more), slots_given=True)
            for n in range(least, room + 1)
            for more in (0, 1)
        }
        for length in caches:
            usual = length == max(caches)  # that of the longest prompt among many
            shape = replace(self.nominal, cache_length=length, prefix_length=positions)
            slots = f"{shape.slots} slots of {length} tokens"
            alone = shape.reads_sequences_alone  # then one program serves all limits
            limits = {shape.key_limit} if alone else {self._sizing.key_limit(n) for n in range(1, length + 1)}
            for limit in sorted(limits):
                in_use = f", {limit} of them in use" if limit and not alone else ""
                yield Program(
                    f"decode {slots}{_after(positions)}{in_use}",
                    functools.partial(compile_decode_steps, replace(shape, key_limit=limit), self.nominal),
                    usual,
                )
            sizes = (shape.architecture, shape.slots, length, shape.cache_dtype, shape.mesh)
            yield Program(f"cache of {slots}", _compiling(allocate_cache, *sizes), usual)
            cache = _with_sharding(abstract_cache(*sizes), cache_sharding(shape.mesh))
            for row in self._rows(min(room, length)):
                yield Program(
                    f"prefill rows of {row} tokens for {slots}{_after(positions)}",
                    self._compiling(prefill, cache, self._row_array(row, COLUMNS), abstract_prefix),
                    usual and self._is_usual(row),
                )

    def choices(self, prefix: int, choices: int, *, long: bool) -> Iterator[Program]:
        """Yields the programs that score choices.

        Args:
            prefix: tokens that all prompts begin with; 0: they share none.
            choices: how many there are after each prompt.
            long: whether one has more than one token.
        """
        if self.max_length - prefix < _LEAST_ROOM:
            return
        yield from self._prefix_programs(prefix)
        positions, abstract_prefix = self._prefix(prefix)
        for row in self._rows(self.max_length - prefix):
            packed, prompts = self._row_array(row, COLUMNS), self._sizing.prompts_of_row(row)
            indices, targets = self._row_array(prompts), self._row_array(prompts, choices)
            name = f"{choices} choices, rows of {row} tokens{_after(positions)}"
            first = (packed, indices, targets, abstract_prefix)
            usual = self._is_usual(row)
            yield Program(f"score {name}", self._compiling(packed_logprobs, *first, collect_kv=long), usual)
            if long:
                cache = self._cache_of_rows(row)
                for tokens in sorted({self._sizing.second_pass(count) for count in range(1, SECOND_PASS_TOKENS + 1)}):
                    second = self._row_array(tokens, SECOND_COLUMNS)
                    yield Program(
                        f"score {name}, {tokens} later tokens",
                        self._compiling(second_logprobs, cache, packed, second, abstract_prefix),
                        usual,
                    )

    def texts(self, prefix: int) -> Iterator[Program]:
        """Yields the programs that score texts. prefix: tokens that all prompts begin with; 0: they share none."""
        if self.max_length - prefix < _LEAST_ROOM:
            return
        yield from self._prefix_programs(prefix)
        positions, abstract_prefix = self._prefix(prefix)
        for row in self._rows(self.max_length - prefix):
            for targets in sorted({self._sizing.targets_of_row(row, count) for count in range(1, row + 1)}):
                indices = self._row_array(targets)
                yield Program(
                    f"score texts of {targets} tokens, rows of {row}{_after(positions)}",
                    self._compiling(token_logprobs, self._row_array(row, COLUMNS), indices, indices, abstract_prefix),
                    self._is_usual(row),
                )

    def embed(self) -> Iterator[Program]:
        """Yields the programs that embed prompts."""
        for row in self._rows(self.max_length):
            segments = self._sizing.prompts_of_row(row)
            compiling = self._compiling(segment_means, self._row_array(row, COLUMNS), segments=segments)
            yield Program(f"embed, rows of {row} tokens", compiling, self._is_usual(row))

    @functools.cached_property
    def _sizing(self) -> Sizing:
        return Sizing.of(self.nominal.mesh)

    @functools.cached_property
    def _params(self) -> Any:
        shape = self.nominal
        weights = abstract_weights(shape.architecture, shape.weights_dtype, shape.compute_dtype)
        return jax.tree.map(_with_sharding, weights, weight_formats(shape))

    def _rows(self, most: int) -> list[int]:
        """Returns the lengths of packed rows for prompts of at most `most` tokens."""
        longest = self._sizing.longest_row(most)
        return sorted({self._sizing.row_length(tokens) for tokens in range(1, longest + 1)})

    def _is_usual(self, row: int) -> bool:
        """Returns whether rows of this length hold several prompts, and not one that is longer."""
        return row <= self._sizing.longest_row(1)

    def _row_array(self, *sizes: int) -> jax.ShapeDtypeStruct:
        """Returns an int32 array with one row for each data shard."""
        sharding = rows_sharding(self.nominal.mesh)
        return jax.ShapeDtypeStruct((self._sizing.shards, *sizes), jnp.int32, sharding=sharding)

    def _everywhere(self, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=replicated(self.nominal.mesh))

    def _cache_of_rows(self, row: int) -> KVCache:
        """Returns the keys and values of packed rows."""
        shape = self.nominal
        cache = jax.eval_shape(lambda: init_cache(shape.architecture, self._sizing.shards, row, shape.compute_dtype))
        return _with_sharding(cache, cache_sharding(shape.mesh))

    def _prefix(self, tokens: int) -> tuple[int, Prefix | None]:
        """Returns the cache positions of a prefix, and the prefix."""
        if not tokens:
            return 0, None
        shape, positions = self.nominal, self._sizing.prefix_length(tokens)
        cache = jax.eval_shape(lambda: init_cache(shape.architecture, 1, positions, shape.compute_dtype))
        return positions, Prefix(_with_sharding(cache, prefix_sharding(shape.mesh)), self._everywhere())

    def _prefix_programs(self, tokens: int) -> Iterator[Program]:
        if tokens:
            positions, _ = self._prefix(tokens)
            arrays = self._everywhere(positions), self._everywhere()
            yield Program(f"prefix of {positions} tokens", self._compiling(make_prefix, *arrays))

    def _compiling(self, function: Any, *arrays: Any, **static: Any) -> Callable[[], object]:
        """Returns what compiles a jitted function of the weights."""
        shape = self.nominal
        sizes = {"architecture": shape.architecture, "mesh": shape.mesh, "compute_dtype": shape.compute_dtype}
        return lambda: function.lower(self._params, *arrays, **sizes, **static).compile()


def _compiling(function: Any, *arguments: Any) -> Callable[[], object]:
    return lambda: function.lower(*arguments).compile()


def _with_sharding(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _after(positions: int) -> str:
    return f" after {positions}" if positions else ""
