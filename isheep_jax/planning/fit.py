"""Searches the most slots, the most rows per update and the least recomputation that fit, by compiling."""

import dataclasses
from collections.abc import Callable

from isheep_jax.config import Config
from isheep_jax.model.architecture import Architecture
from isheep_jax.planning import programs
from isheep_jax.planning.compile import compile_program
from isheep_jax.planning.plan import Hardware
from isheep_jax.planning.programs import make_meshes, make_program

# Upper end of the search, in slots or rows per shard. Beyond it arithmetic limits the speed.
_MAX_PER_SHARD = 1024

Attempt = Callable[[str, str, bool], None]


def fit(
    config: Config, architecture: Architecture, hardware: Hardware, on_attempt: Attempt = lambda *_: None
) -> Config:
    """Returns `config` with the most slots and rows per update that fit, and the least remat that fits.

    Each search doubles a count per shard until it no longer fits, then halves the gap. A setting that does not fit even
    at one per shard stays unchanged.

    Args:
        config: where the search starts.
        architecture: the model's.
        hardware: to compile for.
        on_attempt: called as on_attempt(program, setting, fits) after each compilation.
    """
    meshes = make_meshes(config, architecture, hardware.devices)
    decode_shards = meshes.decode.shape["data"]
    train_shards = meshes.train.shape["data"] * meshes.train.shape["fsdp"]

    def fits(candidate: Config, setting: str, *names: str) -> bool:
        for name in names:
            compiled = compile_program(make_program(name, candidate, architecture, meshes))
            on_attempt(name, setting, compiled.fits(hardware.hbm))
            if not compiled.fits(hardware.hbm):
                return False
        return True

    def search(section: str, field: str, shards: int, *names: str) -> Config:
        def with_count(per_shard: int) -> Config:
            changed = dataclasses.replace(getattr(config, section), **{field: per_shard * shards})
            return dataclasses.replace(config, **{section: changed})

        def good(per_shard: int) -> bool:
            return fits(with_count(per_shard), f"--{section}.{field}={per_shard * shards}", *names)

        best = largest(good, getattr(getattr(config, section), field) // shards)
        return with_count(best) if best else config

    config = search("decode", "slots", decode_shards, programs.DECODE, programs.PREFILL)
    config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, remat="full"))
    config = search("sft", "batch_size", train_shards, programs.TRAIN)
    for remat in ("none", "selective"):
        relaxed = dataclasses.replace(config, sft=dataclasses.replace(config.sft, remat=remat))
        if fits(relaxed, f"--sft.remat={remat}", programs.TRAIN):
            return relaxed
    return config


def largest(good: Callable[[int], bool], start: int) -> int:
    """Returns the largest count from 1 to `_MAX_PER_SHARD` that is good, within an eighth; 0 if none is.

    Assumes that all counts above a bad count are bad.
    """
    count = max(1, min(start, _MAX_PER_SHARD))
    if good(count):
        low, high = count, None
        while low < _MAX_PER_SHARD:
            if not good(min(2 * low, _MAX_PER_SHARD)):
                high = min(2 * low, _MAX_PER_SHARD)
                break
            low = min(2 * low, _MAX_PER_SHARD)
        if high is None:
            return low
    else:
        high = count
        low = count // 2
        while low and not good(low):
            low, high = low // 2, low
        if not low:
            return 0
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def changes(before: Config, after: Config) -> list[str]:
    """Returns the settings that `fit` changed, as arguments of a command."""
    fields = (("decode", "slots"), ("sft", "batch_size"), ("sft", "remat"))
    return [
        f"--{section}.{field}={getattr(getattr(after, section), field)}"
        for section, field in fields
        if getattr(getattr(after, section), field) != getattr(getattr(before, section), field)
    ]
