"""LoRA is refused where the turn markers' rows were never trained, before anything is written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isheep_jax import train
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.errors import UserError

TINY = Path(__file__).parents[2] / "isheep_jax" / "tiny" / "checkpoint"
EMBEDDINGS = "model.embed_tokens.weight"
MARKERS = {"<|user|>": 3, "<|assistant|>": 4, "<|end|>": 5}


def damaged(directory: Path, change) -> Path:
    shutil.copytree(TINY, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors[EMBEDDINGS])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def all_alike(rows):
    noise = np.random.default_rng(0).standard_normal((3, rows.shape[1])).astype(rows.dtype)
    rows[3:6] = rows.mean(0) + 1e-3 * np.linalg.norm(rows.mean(0)) / rows.shape[1] ** 0.5 * noise


def end_is_nothing(rows):
    rows[5] *= 1e-4


def two_alike(rows):
    rows[5] = rows[4]


@pytest.mark.parametrize(
    ("change", "names"),
    [(all_alike, list(MARKERS)), (end_is_nothing, ["<|end|>"]), (two_alike, ["<|assistant|>", "<|end|>"])],
)
def test_markers_that_were_never_trained_are_named_with_what_to_do(tmp_path, change, names):
    model = open_model(damaged(tmp_path / "model", change))
    model.check_chat()
    with pytest.raises(UserError) as caught:
        model.check_adapters()
    assert f"those of {', '.join(names)} were never trained" in str(caught.value)
    assert str(caught.value).endswith("set sft.method=full, or model.chat_template=plain")
    open_model(model.directory, "plain").check_adapters()


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_markers_that_were_trained_are_fine(template):
    open_model(TINY, template).check_adapters()


def test_copy_of_a_marker_for_padding_is_fine(tmp_path):
    # The first token is the unknown one, which is special as well.
    open_model(damaged(tmp_path / "model", lambda rows: rows.__setitem__(0, rows[5]))).check_adapters()


def test_run_with_adapters_is_refused_before_anything_is_written(tmp_path):
    model = damaged(tmp_path / "model", all_alike)
    run = [f"--model.path={model}", f"--workdir={tmp_path / 'run'}", "--config=tiny", "--sft.method=lora"]
    run.append("--sft.batch_size=8")
    with pytest.raises(UserError, match=r"<\|end\|> were never trained"):
        train.main(run)
    assert not (tmp_path / "run").exists()
