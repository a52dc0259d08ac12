import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from isheep_jax.errors import UserError
from isheep_jax.model import weights
from isheep_jax.model.architecture import parameter_table
from isheep_jax.model.tokenizer import Tokenizer
from isheep_jax.model.weights import save_checkpoint
from isheep_jax.sharding import DECODE_RULES, TRAIN_RULES, param_shardings


@pytest.fixture
def tokenizer(small_checkpoint):
    return Tokenizer.load(small_checkpoint)


@pytest.fixture
def damaged(tmp_path):
    """A copy of the Llama fixture that a test may break."""
    return shutil.copytree(parity.FIXTURES / "llama", tmp_path / "damaged")


def assert_equal_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", parity.NAMES)
def test_import_export_import_is_equal_in_every_bit(tmp_path, tokenizer, name, dtype):
    architecture, params = parity.load(parity.FIXTURES / name, dtype)
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    again, loaded = parity.load(tmp_path / "out", dtype)
    assert_equal_bits(params, loaded)
    assert again.eos_token_ids[: len(architecture.eos_token_ids)] == architecture.eos_token_ids
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {np.dtype(dtype)}


def test_an_export_has_the_tensors_of_the_original(tmp_path, tokenizer):
    architecture, params = parity.load(parity.FIXTURES / "qwen2")
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", parity.FIXTURES / "qwen2"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_several_files_have_an_index_and_read_back_equal(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 8_000)
    architecture, params = parity.load(parity.FIXTURES / "llama")
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer, card="A card.\n")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_equal_bits(params, parity.load(tmp_path / "out")[1])
    assert (tmp_path / "out" / "README.md").read_text() == "A card.\n"


@pytest.mark.parametrize(
    ("sizes", "rules"), [((2, 2, 2), TRAIN_RULES), ((1, 4, 2), TRAIN_RULES), ((4, 1, 2), DECODE_RULES)]
)
def test_a_sharded_import_equals_a_whole_one_and_goes_out_again(tmp_path, tokenizer, sizes, rules):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    architecture, whole = parity.load(parity.FIXTURES / "qwen2")
    _, sharded = parity.load(parity.FIXTURES / "qwen2", mesh=mesh, rules=rules)
    assert_equal_bits(whole, sharded)
    shardings = param_shardings(parameter_table(architecture), mesh, rules)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
    save_checkpoint(tmp_path / "out", sharded, architecture, tokenizer)
    assert_equal_bits(whole, parity.load(tmp_path / "out")[1])


def test_a_missing_tensor_is_named_with_its_file(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        parity.load(damaged)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(5,\).*\(16,\)"):
        parity.load(damaged)


def test_quantized_tensors_are_not_read_as_weights(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as I8; only F32, F16, BF16 are read"):
        parity.load(damaged)


def test_a_truncated_file_is_named(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        parity.load(damaged)


def test_a_file_that_the_index_promises_is_missed_by_name(damaged):
    names = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    index = damaged / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors is missing"):
        parity.load(damaged)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match=r"tensor model\..* is missing"):
        parity.load(damaged)
    for text in ("{}", "{", "[1]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is not a safetensors index: it needs a weight_map"):
            parity.load(damaged)


def test_a_directory_without_weights_is_said(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights that can be read: neither"):
        parity.load(damaged)


def test_nothing_stands_under_the_final_name_when_writing_fails(tmp_path, tokenizer, monkeypatch):
    architecture, params = parity.load(parity.FIXTURES / "llama")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    assert not (tmp_path / "out").exists()
    # What it left does not hinder the next attempt.
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists"):
        save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
