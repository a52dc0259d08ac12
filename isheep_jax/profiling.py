"""A trace of a few device calls by JAX's profiler: `step` marks the calls, `tracing` says that they are wanted.

Importing this module does not import jax.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import one_line

# Device calls before the trace, in which everything is compiled, and in the trace.
WARM_UP = 2
TRACED = 3


@dataclass
class Trace:
    """A trace that is wanted, or made.

    directory: where its files go, as TensorBoard's profiler plugin expects them.
    calls: device calls that began so far.
    written: whether the files are there.
    error: why they are not, where that is no matter of too few calls.
    """

    directory: epath.Path
    calls: int = 0
    written: bool = False
    error: str = ""
    # Of the primary, while the profiler runs: it writes to a local disk.
    _local: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    def step(self) -> None:
        """Counts a call, and starts or ends the trace before it."""
        if self.calls == WARM_UP:
            self._start()
        elif self.calls == WARM_UP + TRACED:
            self.end()
        self.calls += 1

    def _start(self) -> None:
        # All chips run the same program: one process sees what there is to see, and its files have one name.
        if not distributed.is_primary():
            return
        import jax

        local = tempfile.TemporaryDirectory(prefix="isheep_jax_profile_")
        try:
            jax.profiler.start_trace(local.name)
        except Exception as error:  # a trace is worth no run
            self.error = one_line(error)
            local.cleanup()
        else:
            self._local = local

    def end(self) -> None:
        """Ends the trace if it has begun, and writes its files."""
        if self._local is None:
            return
        import jax

        local, self._local = self._local, None
        with local:
            try:
                jax.profiler.stop_trace()
                _copy(Path(local.name), self.directory)
            except Exception as error:  # each kind of bucket has errors of its own
                self.error = one_line(error)
            else:
                self.written = True


# The trace that is wanted of the work that is being done; None: none.
_trace: Trace | None = None


def step() -> None:
    """Marks the beginning of a device call: of the decode program, a row of scoring, an update of the weights."""
    if _trace is not None:
        _trace.step()


@contextlib.contextmanager
def tracing(directory: epath.Path) -> Iterator[Trace]:
    """Within the context, traces `TRACED` device calls after the first `WARM_UP`; in the primary process.

    Nothing is raised: where the trace fails, its `error` says why.
    """
    global _trace
    _trace = trace = Trace(directory)
    try:
        yield trace
    finally:
        _trace = None
        trace.end()


def _copy(source: Path, target: epath.Path) -> None:
    """Copies all files of a local directory."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
