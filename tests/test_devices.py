"""The loop writes the same records on eight virtual devices as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Responses at temperature 0 depend on rounding only where two tokens are almost equally probable. Instructions are
# sampled, because the base would repeat the same few; their random keys are the same on every mesh.
SETTINGS = [
    "--config=tiny",
    "--iterations=1",
    "--synthesize.instructions=24",
    "--respond.samples=1",
    "--respond.temperature=0",
    "--select.fraction=0.5",
    "--sft.epochs=2",
    "--sft.batch_size=8",
    "--sft.validation_fraction=0.2",
    "--evaluate.limit=32",
    "--decode.slots=16",
]


def finished_run(directory: Path, devices: int, *settings: str) -> Path:
    result = subprocess.run(
        [sys.executable, "-m", "isheep_jax.train", *SETTINGS, *settings, f"--workdir={directory}"],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return directory


def records(directory: Path) -> dict[str, list[dict]]:
    return {
        path.relative_to(directory).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(directory.glob("**/*.jsonl"))
    }


def assert_same(one, other, path: str) -> None:
    """Asserts that both are equal, numbers up to the rounding of the records."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-4), path
    else:
        assert one == other, path


@pytest.mark.slow
def test_eight_devices_write_same_records_and_learn_with_same_loss(tmp_path):
    on_one = finished_run(tmp_path / "one", 1)
    mesh = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--mesh.decode_tensor=2"]
    on_eight = finished_run(tmp_path / "eight", 8, *mesh)
    one, eight = records(on_one), records(on_eight)
    assert sum(len(part) for part in one.values()) > 24 * 4
    assert_same(one, eight, "records")
    first, second = (
        json.loads((directory / "iteration_1" / "fine_tune.json").read_text())["metrics"]
        for directory in (on_one, on_eight)
    )
    for loss in ("train_loss", "validation_loss"):
        assert first[loss] == pytest.approx(second[loss], abs=1e-5)
    for iteration in ("iteration_0", "iteration_1"):
        answers = [json.loads((d / iteration / "evaluation.json").read_text()) for d in (on_one, on_eight)]
        assert answers[0] == answers[1]
