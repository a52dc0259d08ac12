"""Architectures that are known without a download have the parameter counts of the published checkpoints."""

import pytest

from isheep_jax.errors import UserError
from isheep_jax.model.architecture import parameter_count
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.planning.models import known_models, planned_architecture

# Counts in the safetensors headers of the checkpoints, as the Hugging Face hub shows them.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "Qwen/Qwen1.5-1.8B": 1_836_828_672,
    "Qwen/Qwen1.5-4B": 3_950_369_280,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "Qwen/Qwen1.5-14B": 14_167_290_880,
    "Qwen/Qwen1.5-32B": 32_512_218_112,
    "Qwen/Qwen1.5-72B": 72_287_920_128,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
}


def test_every_known_model_has_published_count():
    assert set(PUBLISHED) == set(known_models())


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameter_counts_are_published_ones(model, tmp_path):
    assert parameter_count(planned_architecture(model, tmp_path)) == PUBLISHED[model]


def test_revision_does_not_change_architecture(tmp_path):
    with_revision = planned_architecture("Qwen/Qwen1.5-4B@main", tmp_path)
    assert with_revision == planned_architecture("Qwen/Qwen1.5-4B", tmp_path)


def test_directory_is_read_itself(small_checkpoint, tmp_path):
    assert planned_architecture(str(small_checkpoint), tmp_path).hidden_size == 32


def test_unknown_model_names_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"--model\.path: nobody/nothing .*known: .*Qwen/Qwen1\.5-72B"):
        planned_architecture("nobody/nothing", tmp_path)


@pytest.mark.parametrize("name", [name for name in config_names() if not name.startswith("tiny")])
def test_models_of_named_configs_are_known(name, tmp_path):
    architecture = planned_architecture(named_config(name).model.path, tmp_path)
    assert architecture.context_length >= named_config(name).decode.max_length
