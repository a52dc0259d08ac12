"""The programs of the GPU's config, compiled for an H100."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 2**30


@pytest.mark.gpu_compile
@pytest.mark.skipif(
    all(importlib.util.find_spec(f"jax_cuda{version}_plugin") is None for version in (12, 13)),
    reason="needs XLA's compiler for GPUs",
)
def test_programs_of_llama_8b_fit_on_h100_and_attend_by_cudnn():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    script = Path(__file__).with_name("compile_for_h100.py")
    run = subprocess.run([sys.executable, script, "llama_8b_gpu"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    programs = {facts["program"]: facts for facts in map(json.loads, run.stdout.splitlines())}
    memory = {name: (facts["arguments"] + facts["temporaries"]) / GIB for name, facts in programs.items()}
    # JAX takes three quarters of the memory: 59.7 GiB.
    assert all(size < 59 for size in memory.values()), memory
    # The cache is 32 GiB, and no part of it exists twice but for what a layer reads.
    assert programs["decode"]["temporaries"] < 1 * GIB
    assert programs["decode"]["triton_calls"] == 1
    # Steps, layers, and three in sampling.
    assert programs["decode"]["loops"] == 5
    assert programs["prefill"]["cudnn_calls"] == programs["score"]["cudnn_calls"] == 1
    assert programs["train step"]["cudnn_calls"] == 3  # forward, the same again for the backward pass, backward
