import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from etils import epath
from memory_bucket import memory_bucket, requests_of
from meshes import mesh_of
from safetensors.numpy import load_file, save_file

from isheep_jax.checkpoint import file_streams, hf_save, hf_weights
from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.checkpoint.safetensors_file import StoredTensor
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import leaves, parameter_table
from isheep_jax.sharding import DECODE_RULES, TRAIN_RULES, param_shardings
from isheep_jax.text.tokenizer import Tokenizer


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


def test_export_has_tensors_of_original(tmp_path, tokenizer):
    architecture, params = parity.load(parity.FIXTURES / "qwen2")
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "out", parity.FIXTURES / "qwen2"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_several_files_have_index_and_read_back_equal(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 8_000)
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
    hf_save.write_tensors(tmp_path, params, parameter_table(architecture), jnp.float32, stem="one", single_file=True)
    assert load_file(tmp_path / "one.safetensors").keys() == index["weight_map"].keys()


@pytest.mark.parametrize(
    ("sizes", "rules"), [((2, 2, 2), TRAIN_RULES), ((1, 4, 2), TRAIN_RULES), ((4, 1, 2), DECODE_RULES)]
)
def test_sharded_import_equals_whole_one_and_goes_out_again(tmp_path, tokenizer, sizes, rules):
    mesh = mesh_of(sizes)
    architecture, whole = parity.load(parity.FIXTURES / "qwen2")
    _, sharded = parity.load(parity.FIXTURES / "qwen2", mesh=mesh, rules=rules)
    assert_equal_bits(whole, sharded)
    shardings = param_shardings(parameter_table(architecture), mesh, rules)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == shardings
    save_checkpoint(tmp_path / "out", sharded, architecture, tokenizer)
    assert_equal_bits(whole, parity.load(tmp_path / "out")[1])


def test_every_byte_is_read_once_whatever_devices(monkeypatch):
    read = []

    def counted(tensor, start, stop, out):
        read.append((tensor.name, start, stop))
        return plain(tensor, start, stop, out)

    plain = StoredTensor.read_rows
    monkeypatch.setattr(StoredTensor, "read_rows", counted)
    sizes, rules = (4, 1, 2), DECODE_RULES  # four replicas
    mesh = mesh_of(sizes)
    architecture, _ = parity.load(parity.FIXTURES / "qwen2", mesh=mesh, rules=rules)
    for _, spec in leaves(parameter_table(architecture)):
        for layer in range(spec.shape[0] if spec.stacked else 1):
            name = spec.hf_name.format(layer=layer)
            rows = [row for n, start, stop in read if n == name for row in range(start, stop)]
            assert sorted(rows) == list(range(spec.hf_shape[0])), name


def test_bucket_is_read_and_written_like_directory(tmp_path, tokenizer, monkeypatch):
    bucket = memory_bucket(monkeypatch)
    architecture, params = parity.load(parity.FIXTURES / "qwen2")
    save_checkpoint(bucket / "out", params, architecture, tokenizer, card="A card.\n")
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer, card="A card.\n")
    assert [path.name for path in bucket.iterdir()] == ["out"]
    for path in (tmp_path / "out").iterdir():
        assert (bucket / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert_equal_bits(params, parity.load(bucket / "out")[1])


@pytest.mark.parametrize(
    ("sizes", "rules"), [((1, 1, 1), TRAIN_RULES), ((2, 2, 2), TRAIN_RULES), ((4, 1, 2), DECODE_RULES)]
)
def test_bucket_is_asked_once_for_each_tensor_and_once_for_each_header(tokenizer, monkeypatch, sizes, rules):
    bucket = memory_bucket(monkeypatch)
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 8_000)
    architecture, params = parity.load(parity.FIXTURES / "llama")
    save_checkpoint(bucket / "out", params, architecture, tokenizer)
    files = {path.name for path in (bucket / "out").glob("*.safetensors")}
    tensors = {}

    def load():
        settings = {"mesh": mesh_of(sizes), "rules": rules, "dtype": jnp.float32, "tensors": tensors}
        assert_equal_bits(hf_weights.load_parameters(bucket / "out", architecture, **settings), params)

    headers = requests_of(lambda: tensors.update(hf_weights.find_tensors(bucket / "out", architecture)))
    asked = [path for _, path, *_ in headers if path.rpartition("/")[2] in files]
    assert len(asked) == 2 * len(files)  # its size and its beginning
    ranges = requests_of(load)
    assert {kind for kind, *_ in ranges} == {"range"}
    assert len(ranges) == len(tensors)
    assert sum(stop - start for *_, start, stop in ranges) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_neighboring_rows_of_devices_are_one_range_and_long_ones_several(tmp_path, monkeypatch):
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    (tmp_path / "file").write_bytes(rows.tobytes() * 2)
    tensors = [
        StoredTensor(epath.Path(tmp_path / "file"), "w", offset, "F32", rows.shape) for offset in (0, rows.nbytes)
    ]
    asked = []
    plain = StoredTensor.read_rows
    monkeypatch.setattr(
        StoredTensor,
        "read_rows",
        lambda self, a, b, out: (asked.append((self.offset > 0, a, b)), plain(self, a, b, out)),
    )
    extents = [(4, 8), (8, 12), (20, 24)]
    with ThreadPoolExecutor(2) as threads:
        for limit, ranges in ((2**20, [(4, 12), (20, 24)]), (6 * 12, [(4, 10), (10, 12), (20, 24)])):
            monkeypatch.setattr(hf_weights, "_READ_BYTES", limit)
            asked.clear()
            parts = hf_weights._read_rows(tensors, extents, (3,), np.dtype(np.float32), threads)
            assert sorted(asked) == [(layer, *extent) for layer in (False, True) for extent in ranges]
            for (start, stop), part in parts.items():
                np.testing.assert_array_equal(part, np.stack([rows[start:stop]] * 2))


def test_layers_of_different_dtypes_are_read_in_wider_one(damaged):
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(jnp.bfloat16)
    save_file(tensors, damaged / "model.safetensors")
    _, params = parity.load(damaged)
    np.testing.assert_array_equal(params["layers"]["w_up"][1], tensors[name].astype(np.float32).T)


def test_tied_lm_head_may_be_stored_again(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, damaged / "model.safetensors")
    assert_equal_bits(parity.load(damaged)[1], parity.load(parity.FIXTURES / "llama")[1])


def test_no_directory_has_final_name_when_writing_fails(tmp_path, tokenizer, monkeypatch):
    architecture, params = parity.load(parity.FIXTURES / "llama")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_streams, "write_file", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    assert not (tmp_path / "out").exists()
    # Leftovers do not prevent the next attempt.
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists"):
        save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
