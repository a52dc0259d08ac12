"""Pre-training packs whole documents, lowers the loss, and writes a directory that loads."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from meshes import mesh_of

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.errors import UserError
from isheep_jax.sharding import DECODE_RULES
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT, corpus, pages, pretrain


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))


def test_batches_hold_whole_documents_with_positions_from_zero(pieces):
    batch = next(pretrain.batches(pieces, 7))
    read = {text for text in itertools.islice(corpus.documents(7), 400)}
    seen = 0
    for row in range(pretrain.BATCH):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            place = np.flatnonzero(batch["segment_ids"][row] == segment)
            tokens = batch["tokens"][row][place]
            np.testing.assert_array_equal(batch["positions"][row][place], np.arange(len(place)))
            assert tokens[0] == pretrain.BOS
            np.testing.assert_array_equal(batch["targets"][row][place][:-1], tokens[1:])
            body = [int(t) for t in tokens[1:] if t != pretrain.EOS]
            seen += pieces.decode(body) in read
    assert seen > 3 * pretrain.BATCH
    padding = batch["segment_ids"] == 0
    assert (batch["targets"][padding] == -1).all()
    assert padding.mean() < 0.1


@pytest.mark.slow
def test_few_steps_lower_loss_and_result_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LAYERS", 1)
    monkeypatch.setattr(pretrain, "BATCH", 4)
    pretrain.pretrain(tmp_path / "base", seed=3, steps=12)
    architecture = read_architecture(tmp_path / "base")
    assert architecture.layers == 1
    assert architecture.eos_token_ids == Tokenizer.load(tmp_path / "base").eos_ids
    mesh = mesh_of()
    params = load_parameters(tmp_path / "base", architecture, mesh=mesh, rules=DECODE_RULES, dtype=jnp.float32)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "base" / "tokenizer.model"))
    batch = next(pretrain.batches(pieces, 99))
    before = pretrain.loss_fn(pretrain.initial_parameters(architecture, 3), architecture, batch)
    assert float(pretrain.loss_fn(params, architecture, batch)) < float(before) - 0.3


def test_same_seed_starts_from_same_weights():
    architecture = pretrain.tiny_architecture((2, 5))
    one, two, other = (pretrain.initial_parameters(architecture, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["embed"], two["embed"])
    assert not np.array_equal(one["embed"], other["embed"])
    assert float(jnp.std(one["layers"]["wq"])) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("command", [pretrain, pages])
def test_output_that_exists_is_refused(command, tmp_path):
    with pytest.raises(UserError, match=f"--output: {tmp_path} exists"):
        command.main(["--output", str(tmp_path)])
