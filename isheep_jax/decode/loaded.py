"""A model placed for decoding: weights on the devices, tokenizer, settings, and how many sequences fit in memory."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import Sizing, check_rows, replicated
from isheep_jax.decode.capacity import fitting_slots, step_bytes
from isheep_jax.decode.prefill import Prefix, make_prefix
from isheep_jax.decode.programs import DecodeShape, weight_formats
from isheep_jax.decode.requests import Request
from isheep_jax.decode.statistics import Statistics
from isheep_jax.decode.tokenization import TokenizedPrompt, tokenize
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_table
from isheep_jax.model.quantization import check_storage_dtype, put_weight
from isheep_jax.sharding import DECODE_RULES, check_divisible, put
from isheep_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """One set of weights, ready to decode; made by `load`.

    config: with the model's context length instead of max_length=0.
    eos_ids: tokens that end a completion, ascending.
    nominal_shape: the shape whose program decides how the weights are stored.
    statistics: what the engine did so far.
    """

    params: Any
    architecture: Architecture
    tokenizer: Tokenizer
    config: DecodeConfig
    mesh: Mesh
    seed: int
    compute_dtype: jnp.dtype
    eos_ids: tuple[int, ...]
    nominal_shape: DecodeShape
    statistics: Statistics

    @functools.cached_property
    def sizing(self) -> Sizing:
        """What decides the sizes of arrays on the mesh."""
        return Sizing.of(self.mesh)

    @property
    def static_args(self) -> dict[str, Any]:
        """The static arguments that jitted functions of the weights have in common."""
        return {"architecture": self.architecture, "mesh": self.mesh, "compute_dtype": self.compute_dtype}

    def tokenize(
        self, request: Request, spare: int = 1, continuation: str = "", tokens: list[int] | None = None
    ) -> TokenizedPrompt:
        """Returns a request's tokens; see `tokenization.tokenize` for the arguments and errors."""
        return tokenize(
            self.tokenizer,
            request,
            tokens=tokens,
            seed=self.seed,
            max_length=self.config.max_length,
            spare=spare,
            continuation=continuation,
        )

    def make_prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """Returns the prefilled tokens that requests share; None for no tokens."""
        if not tokens:
            return None
        padded = np.zeros(self.sizing.row_length(len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        everywhere = replicated(self.mesh)
        return make_prefix(
            self.params, put(padded, everywhere), put(np.int32(len(tokens)), everywhere), **self.static_args
        )

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt with what follows it."""
        return self.config.max_length

    @property
    def slots(self) -> int:
        """How many slots the settings ask for; 0: as many as fit in memory."""
        return self.config.slots

    @property
    def steps_per_call(self) -> int:
        """Decode steps of a call."""
        return self.config.steps_per_call

    @property
    def rows(self) -> int:
        """Rows of the logits, V."""
        return self.architecture.vocab_size

    def choose_slots(self, cache_length: int, useful: int) -> int:
        """Returns how many sequences to decode at the same time: decode.slots or, if that is 0, `fitting_slots`.

        cache_length: tokens that a cache row must hold. useful: as in `fitting_slots`.
        """
        if self.config.slots:
            return self.config.slots
        return fitting_slots(dataclasses.replace(self.nominal_shape, cache_length=cache_length), useful)

    @functools.cached_property
    def step_bytes(self) -> tuple[float, float]:
        """The bytes that a decode step reads on a device: of the weights, and of each cache position of a slot."""
        return step_bytes(self.nominal_shape)


def load(
    params: Any,
    architecture: Architecture,
    tokenizer: Tokenizer,
    config: DecodeConfig,
    *,
    mesh: Mesh,
    seed: int,
    compute_dtype: str | jnp.dtype,
) -> LoadedModel:
    """Moves weights to the devices, stored as the decode program takes them. Arguments and errors are `Engine`'s."""
    dtype = jnp.dtype(compute_dtype)
    config, shape = nominal_shape(architecture, tokenizer, config, mesh=mesh, compute_dtype=dtype)
    # One leaf at a time, to bound the peak memory.
    place = functools.partial(put_weight, dtype=dtype)
    placed = jax.tree.map(place, parameter_table(architecture), params, weight_formats(shape))
    return LoadedModel(placed, architecture, tokenizer, config, mesh, seed, dtype, shape.eos_ids, shape, Statistics())


def nominal_shape(
    architecture: Architecture, tokenizer: Tokenizer, config: DecodeConfig, *, mesh: Mesh, compute_dtype: jnp.dtype
) -> tuple[DecodeConfig, DecodeShape]:
    """Returns the settings with max_length filled in, and their shape. Arguments and errors are `Engine`'s."""
    config = _validated(config, architecture, mesh)
    return config, DecodeShape.nominal(
        config,
        architecture,
        mesh=mesh,
        compute_dtype=compute_dtype,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        missing_ids=tokenizer.missing_ids(architecture.vocab_size),
    )


def _validated(config: DecodeConfig, architecture: Architecture, mesh: Mesh) -> DecodeConfig:
    """Returns the settings with max_length filled in. Raises `UserError` when they do not fit the model or the mesh."""
    if config.max_length != 0 and not 1 < config.max_length <= architecture.context_length:
        raise UserError(
            f"decode.max_length={config.max_length} does not fit the model, whose context is 2 to "
            f"{architecture.context_length} tokens (0: all of it)"
        )
    if config.steps_per_call < 1:
        raise UserError(f"decode.steps_per_call={config.steps_per_call} must be at least 1")
    check_storage_dtype("decode.weights_dtype", config.weights_dtype)
    check_storage_dtype("decode.kv_cache_dtype", config.kv_cache_dtype)
    if config.slots:
        check_rows("decode.slots", config.slots, mesh)
    elif jax.process_count() > 1:
        raise UserError(
            "decode.slots: 0 (as many as fit in memory) is for one process; with several it must be positive"
        )
    check_divisible(parameter_table(architecture), mesh, DECODE_RULES)
    return dataclasses.replace(config, max_length=config.max_length or architecture.context_length)
