"""Requests per second that decoding answers in the steady state, for prompts and completions of one length."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from isheep_jax.config import Config
from isheep_jax.errors import UserError
from isheep_jax.planning import programs
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.iteration import Bounds
from isheep_jax.planning.replay import SupposedModel

# What the checks of vLLM on TPUs demand for prompts of 1,800 and completions of 128 tokens, in requests per second on
# so many v6e chips (vllm-project/tpu-inference, .buildkite/models: MINIMUM_THROUGHPUT_THRESHOLD of
# meta-llama_Llama-3_1-8B-Instruct.yml and meta-llama_Llama-3_3-70B-Instruct.yml).
FLOORS = (("Llama 3.1 8B", "v6e-1", 1, 10.77), ("Llama 3.3 70B", "v6e-8", 8, 7.0))
FLOOR_SHAPE = "1800/128"


@dataclass(frozen=True)
class Shape:
    """A request. prompt: tokens of the prompt. new: tokens of the completion."""

    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.new}"


@dataclass(frozen=True)
class Throughput:
    """Requests per second on all chips: at most, and as forecast; None where no times are known."""

    shape: Shape
    bound: float
    forecast: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns both as JSON."""
        return {"shape": str(self.shape), "bound": self.bound, "forecast": self.forecast}


def parse_shape(text: str, config: Config) -> Shape:
    """Parses "PROMPT/NEW", tokens of prompt and completion. Raises `UserError` if it exceeds `decode.max_length`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.replace(",", "").replace(" ", ""))
    if not match or not int(match[1]) or not int(match[2]):
        raise UserError(f"--shape: '{text}' is not PROMPT/NEW, tokens of a prompt and of its completion: {FLOOR_SHAPE}")
    shape = Shape(int(match[1]), int(match[2]))
    if config.decode.max_length and shape.prompt + shape.new > config.decode.max_length:
        raise UserError(
            f"--shape: {shape} takes {shape.prompt + shape.new} tokens, more than decode.max_length="
            f"{config.decode.max_length}"
        )
    return shape


def throughput(
    shape: Shape,
    config: Config,
    prefill_tokens: int,
    bounds: Bounds,
    model: SupposedModel,
    times: StepTimes | None,
) -> Throughput:
    """Returns the requests per second with all slots busy: `new` steps serve a request of every slot.

    Args:
        shape: of every request.
        config: settings.
        prefill_tokens: of a prefill step for which `bounds` has the time.
        bounds: least times of the programs.
        model: as the schedule sees it.
        times: forecast times; None: there is no forecast.
    """
    slots = config.decode.slots
    # Requests are at all stages of their completion.
    positions = shape.prompt + (shape.new + 1) / 2
    least = shape.new * bounds.decode(positions) + slots * shape.prompt / prefill_tokens * (
        bounds.steps[programs.PREFILL].seconds
    )
    if times is None:
        return Throughput(shape, slots / least, None)
    sizing = model.sizing
    aligned = sizing.aligned(shape.prompt)
    row = sizing.capacity(math.ceil(slots / sizing.shards) * aligned)
    row = max(row, sizing.row_length(aligned))
    calls = math.ceil(slots / sizing.shards / (row // aligned))
    taken = times.prefill_call(row).seconds * calls
    read = model.positions_read(shape.prompt + np.arange(shape.new), shape.new)
    taken += times.decode_step(slots, read).seconds * shape.new
    return Throughput(shape, slots / least, slots / taken)
