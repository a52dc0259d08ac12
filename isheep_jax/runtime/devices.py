"""The compilation cache, and the devices in words: what a command needs before it loads a model."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

# Programs that compile faster than this (in seconds) are not worth a file in the compilation cache.
MIN_CACHED_COMPILE_SECONDS = 0.3


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory; JAX_COMPILATION_CACHE_DIR names another directory."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "isheep_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_CACHED_COMPILE_SECONDS)


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Returns a phrase such as "8 TPU v4 devices" or "1 cpu device"."""
    return f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"


def default_dtype() -> str:
    """Returns the compute dtype "auto": float32 on CPUs, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
