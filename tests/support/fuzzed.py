"""Limits of time and memory for tests that read files of any content, and what such a reader may say."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings

from isheep_jax.errors import UserError, printable

# A file takes milliseconds; the limits of time (ms) and memory (bytes) are those of a hang.
FUZZED = settings(
    derandomize=True,
    database=None,
    deadline=10_000,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY = 2**30


class Quiet(bytes):
    """Bytes that are not printed in full when a test fails."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Raises MemoryError in what asks for more than `MEMORY` beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_or_refuse(read: Callable[[Path], object], path: Path) -> bool:
    """Returns whether a file is read; asserts that it is refused in one short line that names it otherwise."""
    try:
        with limited_memory():
            read(path)
    except UserError as error:
        message = str(error)
        assert message == printable(message)
        assert "\n" not in message
        assert str(path) in message
        assert len(message) < 1000 + 2 * len(str(path))
        return False
    return True
