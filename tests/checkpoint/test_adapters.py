"""A model that is stored as an adapter is, bit for bit, the model that would have been written whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from small_model import same_bits

from isheep_jax.checkpoint import hf_save
from isheep_jax.checkpoint.adapters import save_adapter
from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.checkpoint.kept_rows import KeptRows
from isheep_jax.checkpoint.pretrained import open_adapter, open_model
from isheep_jax.checkpoint.safetensors_file import StoredTensor
from isheep_jax.config import SFTConfig
from isheep_jax.errors import UserError
from isheep_jax.model.lora import lora_table, merge_lora
from isheep_jax.sharding import DECODE_RULES, TRAIN_RULES, param_shardings

CONFIG = SFTConfig(lora_rank=5, lora_alpha=7.0)


def random_adapter(architecture, seed):
    table = lora_table(architecture, CONFIG.lora_rank)
    leaves, tree = jax.tree.flatten(table)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [draw.normal(size=spec.shape).astype(np.float32) * 0.05 for spec in leaves]), table


def trained(base, place, dtype, seed=0):
    """What a fine-tuning of `base` on a mesh of eight devices leaves: (whole model, adapter), each opened."""
    mesh = mesh_of((2, 2, 2))
    adapters, table = random_adapter(base.architecture, seed)
    adapters = jax.device_put(adapters, param_shardings(table, mesh, TRAIN_RULES))
    params = base.load(mesh=mesh, rules=TRAIN_RULES, dtype=dtype)
    merged = jax.jit(lambda p, a: merge_lora(p, a, CONFIG.lora_alpha / CONFIG.lora_rank))(params, adapters)
    save_checkpoint(place / "model", merged, base.architecture, base.tokenizer, dtype=dtype, card="A card.\n")
    save_adapter(place / "adapter", adapters, base.architecture, CONFIG, "base", dtype=dtype, tokenizer=base.tokenizer)
    return open_model(place / "model"), open_adapter(place / "adapter", base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_base_with_adapters_is_the_written_model_in_every_bit(small_checkpoint, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 20_000)
    base = open_model(small_checkpoint)
    whole, adapted = trained(base, tmp_path / "1", dtype)
    # An adapter that was trained on the model that an adapter made.
    whole_again, adapted_again = trained(whole, tmp_path / "2", dtype, seed=1)
    adapted_again = open_adapter(tmp_path / "2" / "adapter", adapted)
    for written, merged in ((whole, adapted), (whole_again, adapted_again)):
        for sizes, rules in (((1, 1, 1), DECODE_RULES), ((4, 1, 2), DECODE_RULES), ((2, 2, 2), TRAIN_RULES)):
            for how in ({"dtype": dtype}, {"dtype": jnp.float32, "weights_dtype": "int8"}):
                loaded = [model.load(mesh=mesh_of(sizes), rules=rules, **how) for model in (written, merged)]
                assert same_bits(*loaded)
        assert not same_bits(loaded[0], base.load(mesh=mesh_of(sizes), rules=rules, **how))
        merged.save(tmp_path / "out", "A card.\n")
        out, expected = (
            {path.name: path.read_bytes() for path in d.iterdir()} for d in (tmp_path / "out", written.directory)
        )
        assert out == expected
        (tmp_path / "out").rename(tmp_path / f"out-{len(merged.adapters)}")
    assert len({model.weights_digest() for model in (base, whole, adapted, adapted_again)}) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "r and lora_alpha"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"r": 6}, "has shape"),
    ],
)
def test_adapter_of_another_kind_is_refused_by_name(small_checkpoint, tmp_path, change, words):
    base = open_model(small_checkpoint)
    adapters, _ = random_adapter(base.architecture, 0)
    place = tmp_path / "adapter"
    save_adapter(place, adapters, base.architecture, CONFIG, "base", dtype=jnp.float32, tokenizer=base.tokenizer)
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        open_adapter(place, base)


def test_adapter_of_another_base_is_refused(small_checkpoint, tmp_path):
    base = open_model(small_checkpoint)
    adapters, _ = random_adapter(base.architecture, 0)
    place = tmp_path / "adapter"
    save_adapter(place, adapters, base.architecture, CONFIG, "base", dtype=jnp.float32, tokenizer=base.tokenizer)
    wider = dataclasses.replace(base, architecture=dataclasses.replace(base.architecture, layers=3))
    with pytest.raises(UserError, match="their shapes differ"):
        open_adapter(place, wider)


def test_weights_that_are_kept_are_not_read_again(small_checkpoint, tmp_path, monkeypatch):
    read = []
    plain = StoredTensor.read_rows
    monkeypatch.setattr(
        StoredTensor, "read_rows", lambda self, a, b, out: (read.append(self.name), plain(self, a, b, out))
    )
    base = dataclasses.replace(open_model(small_checkpoint), kept=KeptRows(10**9))
    adapters, _ = random_adapter(base.architecture, 0)
    save_adapter(
        tmp_path / "adapter", adapters, base.architecture, CONFIG, "base", dtype=jnp.float32, tokenizer=base.tokenizer
    )
    decoding = {"mesh": mesh_of((4, 1, 2)), "rules": DECODE_RULES, "dtype": jnp.float32}
    first = base.load(**decoding)
    base.load(mesh=mesh_of((2, 2, 2)), rules=TRAIN_RULES, dtype=jnp.float32)
    read.clear()
    assert same_bits(base.load(**decoding), first)
    base.load(mesh=mesh_of((2, 2, 2)), rules=TRAIN_RULES, dtype=jnp.bfloat16)
    open_adapter(tmp_path / "adapter", base).load(**decoding)
    assert [name for name in read if "lora" not in name] == []
    # Training that splits the weights as decoding does has one copy with it.
    alike = dataclasses.replace(base, kept=KeptRows(10**9))
    alike.load(**decoding)
    read.clear()
    alike.load(mesh=mesh_of((4, 1, 2)), rules=TRAIN_RULES, dtype=jnp.float32)
    assert read == []
    # What does not fit is read as before.
    small = dataclasses.replace(base, kept=KeptRows(10_000))
    for _ in range(2):
        read.clear()
        assert same_bits(small.load(**decoding), first)
    assert 0 < len(set(read)) < len(base.tensors)
