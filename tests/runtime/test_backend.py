"""The backend loads a judge that is another model than the run's, with its own architecture and tokenizer."""

import json
import shutil

import pytest
from etils import epath

from isheep_jax.config import AssessConfig, Config, DecodeConfig, ModelConfig, SFTConfig
from isheep_jax.decode.requests import Request
from isheep_jax.errors import UserError
from isheep_jax.runtime.backend import JaxBackend

REQUESTS = [Request(f"{n}", text) for n, text in enumerate(("Quality (1-10):", "add 2 and 3"))]


def backend(workdir, model, judge="current", context=64):
    config = Config(
        workdir=str(workdir),
        model=ModelConfig(path=str(model), compute_dtype="float32"),
        assess=AssessConfig(judge=str(judge)),
        decode=DecodeConfig(slots=8, steps_per_call=8, max_length=context),
        sft=SFTConfig(sequence_length=64, batch_size=8),
    )
    return JaxBackend(config), config


def scores(model):
    found = {s.id: s.logprobs for s in model.choice_logprobs(REQUESTS, (" 1", " 7"))}
    return [x for request in REQUESTS for x in found[request.id]]


def test_foreign_judge_scores_as_it_does_by_itself_and_writer_stays_what_it_is(small_checkpoint, tmp_path):
    alone, _ = backend(tmp_path, "tiny")
    expected = scores(alone.load(None))
    run, _ = backend(tmp_path, small_checkpoint, "tiny")
    writer = scores(run.load(None))
    assert scores(run.load(run.judge)) == pytest.approx(expected, abs=1e-5)
    assert writer != pytest.approx(expected, abs=0.1)
    assert scores(run.load(None)) == pytest.approx(writer, abs=1e-5)


def test_weights_have_the_digest_of_their_files(small_checkpoint, tmp_path):
    run, _ = backend(tmp_path, small_checkpoint)
    digest = run.weights_digest(None)
    assert run.weights_digest(epath.Path(small_checkpoint)) == digest
    shutil.copytree(small_checkpoint, tmp_path / "other")
    (path,) = (tmp_path / "other").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run.weights_digest(epath.Path(tmp_path / "other")) != digest


def test_judge_that_is_no_model_is_refused_before_anything_is_written(small_checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"empty/config\.json"):
        backend(tmp_path / "run", small_checkpoint, tmp_path / "empty")
    with pytest.raises(UserError, match=r"--assess\.judge: /nowhere"):
        backend(tmp_path / "run", small_checkpoint, "/nowhere")
    with pytest.raises(UserError, match=r"--decode\.max_length: 256 tokens are more than the 128 of --assess\.judge"):
        backend(tmp_path / "run", small_checkpoint, "tiny", context=256)
    assert not (tmp_path / "run").exists()


def test_judge_without_turns_is_asked_with_texts(small_checkpoint, tmp_path):
    judge = shutil.copytree(small_checkpoint, tmp_path / "judge")
    (judge / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((judge / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (judge / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"--assess\.framing: .*judge has no chat template, so that it must be text"):
        backend(tmp_path / "run", small_checkpoint, judge)
