"""Programs that compile for TPUs, each in a process of its own: libtpu reads the environment when it is loaded."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")


def run_program(program: str) -> list[str]:
    """Runs the text of a program, which may be indented, and returns the words that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()
