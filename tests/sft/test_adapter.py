"""Adapters as PEFT directories: what is written, and that it is the difference between base and merged model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letter_tokenizer import LetterTokenizer
from meshes import mesh_of
from safetensors.numpy import load_file
from small_model import LLAMA, QWEN, SETTINGS, copying, on_host, same_bits, weights

from isheep_jax.checkpoint.adapters import save_adapter
from isheep_jax.checkpoint.hf_config import config_json
from isheep_jax.checkpoint.hf_save import write_tensors
from isheep_jax.model.architecture import parameter_table
from isheep_jax.model.lora import lora_table, merge_lora
from isheep_jax.model.transformer import ForwardSetup, forward, logits
from isheep_jax.sft.trainer import fine_tune
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT

CONFIG = dataclasses.replace(
    SETTINGS, method="lora", learning_rate=0.02, lora_alpha=12.0, validation_fraction=0.2, checkpoint_every=3
)
SCALE = CONFIG.lora_alpha / CONFIG.lora_rank


def tune(directory, architecture=LLAMA, params=None, config=CONFIG, mesh=None):
    return fine_tune(
        jax.tree.map(jnp.copy, weights(architecture) if params is None else params),
        architecture,
        LetterTokenizer(),
        copying(40),
        config,
        mesh=mesh or mesh_of(),
        directory=directory,
        seed=0,
        compute_dtype=jnp.float32,
    )


def save(directory, adapters, architecture=LLAMA, base="base"):
    tokenizer = Tokenizer.load(CHECKPOINT)
    save_adapter(directory, adapters, architecture, CONFIG, base, dtype=jnp.float32, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=[LLAMA, QWEN], ids=["llama", "qwen2"])
def tuned(request, tmp_path_factory):
    """The architecture, its merged weights, the adapters and the directory in which they are written."""
    place = tmp_path_factory.mktemp("tuned")
    merged, adapters, _ = tune(place / "checkpoints", request.param)
    save(place / "adapter", adapters, request.param, "/models/base")
    return request.param, merged, adapters, place / "adapter"


def test_base_and_adapters_merge_to_returned_weights(tuned):
    architecture, merged, adapters, _ = tuned
    expected = jax.jit(lambda p, a: merge_lora(p, a, SCALE))(weights(architecture), adapters)
    close = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), on_host(merged), on_host(expected))
    assert all(jax.tree.leaves(close))
    assert not same_bits(merged, weights(architecture))


def test_adapters_are_float32_also_under_bfloat16_model(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights())
    merged, adapters, _ = tune(tmp_path / "checkpoints", params=params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"float32"}
    save(tmp_path / "adapter", adapters)
    assert {t.dtype.name for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {"float32"}


def test_full_fine_tuning_has_no_adapters(tmp_path):
    _, adapters, _ = tune(tmp_path, config=SETTINGS)
    assert adapters is None


def test_files_add_up_to_merged_weights_as_peft_adds_them(tuned, tmp_path):
    architecture, merged, _, directory = tuned
    stored = load_file(directory / "adapter_model.safetensors")
    for name, params in (("base", weights(architecture)), ("merged", merged)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, params, parameter_table(architecture), jnp.float32)
    base, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = 0
    for name, weight in base.items():
        a, b = (stored.pop(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight", None) for x in "AB")
        if a is not None:
            np.testing.assert_allclose(weight + SCALE * b @ a, whole[name], atol=1e-5)
            changed += 1
        else:
            np.testing.assert_array_equal(weight, whole[name])
    assert not stored
    assert changed == 7 * architecture.layers


def test_settings_are_those_that_peft_needs(tuned):
    *_, directory = tuned
    settings = json.loads((directory / "adapter_config.json").read_text())
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/models/base",
        "revision": None,
        "r": 4,
        "lora_alpha": 12.0,
        "lora_dropout": 0.3,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("org/model@v1.0", "org/model", "v1.0"),
        ("org/model", "org/model", None),
        ("/data/a@b/c", "/data/a@b/c", None),
        ("gs://bucket/a@b", "gs://bucket/a@b", None),
    ],
)
def test_only_name_on_hub_has_revision(tmp_path, base, name, revision):
    table = lora_table(LLAMA, CONFIG.lora_rank)
    zeros = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), table)
    save(tmp_path / "adapter", zeros, base=base)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (name, revision)


def test_what_earlier_attempt_left_is_replaced(tuned, tmp_path):
    architecture, _, adapters, directory = tuned
    for stale in ("adapter", "adapter.partial"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "stale.bin").write_bytes(b"x")
    save(tmp_path / "adapter", adapters, architecture, "/models/base")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == {
        p.name: p.read_bytes() for p in directory.iterdir()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_sharded_training_writes_whole_adapters(tmp_path):
    _, adapters, _ = tune(tmp_path / "checkpoints", mesh=mesh_of((2, 2, 2)))
    save(tmp_path / "adapter", adapters)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert stored["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].shape == (32, 4)
    q = adapters["layers"]["wq"]
    np.testing.assert_array_equal(
        stored["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"],
        np.asarray(q["b"])[1].reshape(4, 32).T,
    )


@pytest.mark.torch
def test_peft_gives_logits_of_merged_model(tuned, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    architecture, merged, _, directory = tuned
    (tmp_path / "base").mkdir()
    write_tensors(tmp_path / "base", weights(architecture), parameter_table(architecture), jnp.float32)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config_json(architecture, "float32")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, architecture.vocab_size, (2, 20))
    with torch.no_grad():
        plain = model(torch.tensor(tokens)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(model, directory).eval()(torch.tensor(tokens)).logits.numpy()
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    hidden, _ = forward(merged, architecture, jnp.asarray(tokens), positions, ForwardSetup(jnp.float32))
    ours = np.asarray(logits(merged, architecture, hidden, jnp.float32))
    assert np.abs(ours - adapted).max() < 1e-4 * np.abs(ours).max()
    assert np.abs(ours - plain).max() > 0.05 * np.abs(ours).max()
