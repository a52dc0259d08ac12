import dataclasses
import json

import jax
import jax.numpy as jnp
import parity
import pytest

from isheep_jax.checkpoint.hf_config import config_json, read_architecture
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import (
    FAMILIES,
    RopeScaling,
    init_parameters,
    leaves,
    parameter_count,
    parameter_table,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def fields(name="llama"):
    return json.loads((parity.FIXTURES / name / "config.json").read_text())


def read(directory, config):
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)


def test_both_spellings_of_rope_are_read_alike(tmp_path):
    new = fields("llama_scaled_rope")
    assert "rope_parameters" in new
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}
    architecture = read(tmp_path, new)
    assert architecture == read(tmp_path, old)
    assert architecture.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    # Before llama3 the field was called type.
    linear = read(tmp_path, old | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


def test_fields_that_early_files_leave_out_take_familys_defaults(tmp_path):
    early = fields()
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        early.pop(name)
    architecture = read(tmp_path, early)
    assert architecture.rope_theta == 10_000
    assert architecture.rope_scaling is None
    assert architecture.kv_heads == architecture.heads == 4
    assert architecture.head_dim == 4
    assert not architecture.tied_embeddings


def test_eos_ids_come_from_both_files_once(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read(tmp_path, fields() | {"eos_token_id": 2}).eos_token_ids == (2, 7)
    assert read(tmp_path, fields() | {"eos_token_id": None}).eos_token_ids == (7, 2)


@pytest.mark.parametrize("name", parity.NAMES)
def test_model_type_names_family_where_architectures_is_missing(tmp_path, name):
    config = fields(name)
    del config["architectures"]
    assert read(tmp_path, config) == read(tmp_path, config | {"architectures": []}) == read(tmp_path, fields(name))


@pytest.mark.parametrize("change", [{"architectures": ["MixtralForCausalLM"]}, {"architectures": [], "model_type": ""}])
def test_error_of_unsupported_model_lists_all_families(tmp_path, change):
    with pytest.raises(UserError) as caught:
        read(tmp_path, fields() | change)
    assert all(f"{traits.class_name} ({family})" in str(caught.value) for family, traits in FAMILIES.items())


@pytest.mark.parametrize("name", parity.NAMES)
def test_exports_config_reads_back_equal(tmp_path, name):
    architecture = read_architecture(parity.FIXTURES / name)
    assert read(tmp_path, config_json(architecture, "float32")) == architecture


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures=['MixtralForCausalLM'] is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "is not supported"),
        ({"architectures": None, "model_type": "mixtral"}, "model_type='mixtral' is not supported"),
        ({"architectures": [], "model_type": None}, "architectures and model_type are missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks the field low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0 has the wrong type or sign"),
        ({"rope_parameters": {"rope_theta": "large"}}, "rope_theta='large' has the wrong type"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": [8.0]}, "rope_parameters=[8.0] is not an object"),
        ({"vocab_size": "many"}, "vocab_size='many' has the wrong type"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 has the wrong type or sign; it is a positive integer"),
        ({"hidden_size": float("inf")}, "Infinity is no number"),
        ({"rms_norm_eps": float("nan")}, "NaN is no number"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True has the wrong type"),
        ({"rms_norm_eps": 1e-40}, "rms_norm_eps=1e-40 is a number that no model has"),
        ({"rope_parameters": {"rope_theta": 1e300}}, "rope_theta=1e+300 is a number that no model has"),
        ({"max_position_embeddings": 1}, "max_position_embeddings=1 leaves no room for an answer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than any model has"),
        ({"max_position_embeddings": 10**40}, "is a number that no model has"),
        ({"intermediate_size": 10**10}, "intermediate_size=10000000000 is a number that no model has"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' has the wrong type; it is true or false"),
        ({"model_type": "mistral"}, "model_type='mistral' is not that of LlamaForCausalLM (architectures), 'llama'"),
        ({"layer_types": [["full_attention"], {}]}, "layer_types"),
        ({"bos_token_id": True}, "bos_token_id=True has the wrong type"),
        ({"vocab_size": [[[1]]]}, "vocab_size=[[[1]]] has the wrong type"),
        ({"vocab_size": "\x1b[2J" * 10_000}, "vocab_size='"),
        ({"residual_multiplier": 0.22}, "residual_multiplier=0.22 is not implemented"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not implemented"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers=[1, 1, 0] is not implemented"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not implemented"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized weights (quantization)"),
        ({"rope_theta": 5e5}, "rope_theta=500000.0, but rope_parameters has 10000; remove the wrong one"),
        (
            {"rope_scaling": LLAMA3_ROPE},
            "rope_parameters and rope_scaling say different things",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "only one set of numbers is"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "must be less than high_freq_factor=4"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "RoPE scaling ['llama3']"),
        ({"hidden_size": 32.5}, "hidden_size=32.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"head_dim": None, "hidden_size": 18}, "head_dim=4.5 has the wrong type or sign; it is a positive integer"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read(tmp_path, fields() | change)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_gemmas_rope_by_kind_of_layer_is_of_objects(tmp_path):
    config = fields("gemma3")
    for wrong in ([1], "default", {"sliding_attention": [1]}, {"full_attention": "default"}):
        with pytest.raises(UserError, match="rope_parameters"):
            read(tmp_path, config | {"rope_parameters": wrong})


def test_biases_that_a_family_has_anyway_need_no_field(tmp_path):
    # transformers does not look at the field in this family.
    assert read(tmp_path, fields("qwen2") | {"attention_bias": True}) == read(tmp_path, fields("qwen2"))


def test_missing_field_is_named(tmp_path):
    config = fields()
    del config["rms_norm_eps"]
    with pytest.raises(UserError, match="field rms_norm_eps is missing"):
        read(tmp_path, config)


def test_what_is_not_model_directory_is_said(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a model directory: it has no config\.json"):
        read_architecture(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            read_architecture(tmp_path)


@pytest.mark.parametrize("name", parity.NAMES)
def test_table_is_parameters_tree_and_says_their_shapes(name):
    architecture = read_architecture(parity.FIXTURES / name)
    params = init_parameters(architecture, jax.random.key(0), jnp.bfloat16)
    shapes = jax.tree.map(lambda spec: spec.shape, parameter_table(architecture))
    assert jax.tree.map(jnp.shape, params) == shapes
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert parameter_count(architecture) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all(len(spec.axes) == len(spec.shape) for _, spec in leaves(parameter_table(architecture)))


def test_untied_embeddings_have_head_of_their_own():
    architecture = read_architecture(parity.FIXTURES / "llama")
    assert "lm_head" not in parameter_table(architecture)
    assert "lm_head" in parameter_table(dataclasses.replace(architecture, tied_embeddings=False))
