"""Published files of benchmarks, for tests that compare with published figures."""

import os
from pathlib import Path

import pytest

VARIABLE = "ISHEEP_JAX_TASK_DATA"


def published(name: str) -> Path:
    """Returns the path of a file, or directory, in the directory that the environment names; skips where it is missing.

    The directory is laid out like `evaluate.task_data`: TASK/FILE.
    """
    path = Path(os.environ.get(VARIABLE, "none")) / name
    if not path.exists():
        pytest.skip(f"set {VARIABLE} to a directory that holds {name}")
    return path
