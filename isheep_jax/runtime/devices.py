"""The compilation cache, and the devices in words: what a command needs before it loads a model."""

import functools
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from isheep_jax import distributed
from isheep_jax.errors import UserError, one_line, printable
from isheep_jax.files import full_path, on_object_store

# Programs that compile faster than this (in seconds) are not worth a file in the compilation cache.
MIN_CACHED_COMPILE_SECONDS = 0.3
# Characters of jax's message that an error quotes.
_QUOTED = 200
_CPU_INFO = Path("/proc/cpuinfo")


# The directory that this process keeps compiled programs in, of its own choice.
_directory: str | None = None


@functools.cache  # once for all models of a run
def use_compilation_cache(of_run: epath.Path | None = None) -> None:
    """Keeps compiled programs on disk or in a bucket, for the next start; JAX_COMPILATION_CACHE_DIR says where.

    Otherwise the programs of a run in a bucket, or of several processes, are kept with the run: there jax writes those
    of process 0 alone, which the others and a new machine could not find in its home. All others are in the user's
    cache directory. A program for CPUs is machine code for one kind of CPU, so that each kind has a directory of its
    own.

    Where nothing can be written, programs are compiled in each start, after one note on stderr.

    of_run: a directory for them in the run's, which all processes see; None: there is no run.
    Raises UserError where jax cannot open the devices.
    """
    global _directory
    # A damaged file, or a disk that has become full, costs the time of compiling, and no more.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache", UserWarning)
    backend, chosen = default_backend(), jax.config.jax_compilation_cache_dir
    if chosen not in (None, _directory):
        if not on_object_store(chosen) and not _is_writable(Path(chosen)):
            jax.config.update("jax_enable_compilation_cache", False)
            _note(f"JAX_COMPILATION_CACHE_DIR={chosen} cannot be written")
        return
    with_run = of_run is not None and (on_object_store(of_run) or distributed.is_distributed())
    directory = full_path(of_run) if with_run else epath.Path(_cache_home() / "isheep_jax" / "compiled")
    if backend == "cpu":
        features = _cpu_features()
        # XLA refuses on such CPUs what it wrote there itself, with a page of text for each program.
        if any(feature.startswith("avx512") for feature in features):
            return
        directory /= "cpu-" + hashlib.sha256(" ".join(features).encode()).hexdigest()[:8]
    if not _is_usable(directory):
        place = f"{directory} cannot be written" if with_run else "there is no cache directory that can be written"
        _note(f"{place}; JAX_COMPILATION_CACHE_DIR names one")
        return
    if _directory is not None:  # jax looks at the setting once
        compilation_cache.reset_cache()
    _directory = os.fspath(directory)
    jax.config.update("jax_compilation_cache_dir", _directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_CACHED_COMPILE_SECONDS)


def compilation_cache_directory() -> str | None:
    """Returns where compiled programs are kept; None where they are not."""
    return jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None


def default_backend() -> str:
    """Returns the kind of the devices, such as "cpu".

    Raises UserError where jax cannot open those that are asked for.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        what = f"JAX_PLATFORMS={chosen}: jax finds no such device here" if chosen else "jax finds no device"
        why = f" ({one_line(error)[:_QUOTED]})" if str(error) else ""
        unset = "unset it, or " if chosen else ""
        raise UserError(f"{what}{why}; {unset}install jax for the device (the extras gpu and tpu)") from None


def _cache_home() -> Path:
    """Returns the user's cache directory; a relative path where the user, as in some containers, has no home."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(chosen) if chosen else Path.home() / ".cache"
    except RuntimeError:
        return Path()


def _cpu_features() -> list[str]:
    """Returns the instruction sets of this machine's CPUs by name; none where the system does not say."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    features = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(next(features, []))


def _is_usable(directory: epath.Path) -> bool:
    """Returns whether programs can be kept in a directory: of a run, process 0 keeps them for all."""
    if on_object_store(directory) or not distributed.is_primary():
        return True
    return directory.is_absolute() and _is_writable(Path(directory))


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _note(reason: str) -> None:
    if distributed.is_primary():
        print(printable(f"note: programs are compiled in each start: {reason}"), file=sys.stderr)


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Returns a phrase such as "8 TPU v4 devices" or "1 cpu device"."""
    return f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"


def default_dtype() -> str:
    """Returns the compute dtype "auto": float32 on CPUs, bfloat16 elsewhere."""
    return "float32" if default_backend() == "cpu" else "bfloat16"
