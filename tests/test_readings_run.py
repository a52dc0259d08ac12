"""A run of the command whose pairs are chosen by all readings together, on a small random model."""

import json
from pathlib import Path

import pytest

from isheep_jax.loop.records import Scores, Selected, from_line, kept
from isheep_jax.train import main

READINGS = ("rubric", "lift", "backward_lift", "likelihood", "self_consistency", "pairwise")
SMALL = [
    "--config=tiny",
    "--iterations=1",
    "--synthesize.instructions=6",
    "--respond.samples=2",
    "--select.fraction=1",
    "--evaluate.limit=8",
    "--sft.batch_size=8",
    "--decode.max_length=512",
    "--decode.slots=16",
    "--guard.judge=off",
]


def lines(directory: Path, cls: type) -> list:
    paths = sorted(directory.glob("part-*"))
    return [from_line(cls, line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("framing", ["text", "chat"])
def test_all_readings_together_choose_what_is_learned(small_checkpoint, tmp_path, framing):
    readings = [f"--assess.readings={','.join(READINGS)}", f"--assess.framing={framing}"]
    ranking = ["--select.length_control=regression", "--select.weights=1,2,1,1,0,1"]
    main([*SMALL, f"--model.path={small_checkpoint}", f"--workdir={tmp_path}/run", *readings, *ranking])
    place = tmp_path / "run" / "iteration_1"
    scores = lines(place / "scores", Scores)
    assert scores
    for record in scores:
        assert set(record.readings) == set(READINGS[1:])
        if record.verdict.reason != "unscored":
            assert all(reading.value is not None for reading in record.readings.values())
    selected = lines(place / "selected", Selected)
    assert all(0 <= record.ranked_by <= 1 and set(record.readings) == set(READINGS) for record in kept(selected))
    assert set(json.loads((place / "summary.json").read_text())["readings"]) == set(READINGS)
