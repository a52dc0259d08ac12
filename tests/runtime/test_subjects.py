"""Which models the command evaluate measures, and how they are asked."""

import dataclasses
import shutil

import pytest

from isheep_jax.config import Config, DecodeConfig, ModelConfig, to_json
from isheep_jax.errors import UserError
from isheep_jax.files import write_json
from isheep_jax.runtime.subjects import Decoding, subjects
from isheep_jax.tiny import EMBEDDED


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    model = ModelConfig(path="tiny", chat_template="chatml", compute_dtype="float32")
    config = Config(model=model, seed=7, decode=DecodeConfig(max_length=128, kv_cache_dtype="int8", slots=99))
    (directory / "iteration_0").mkdir(parents=True)
    (directory / "config.json").write_text(to_json(config))
    for number in (1, 2, 10):
        shutil.copytree(EMBEDDED["tiny"], directory / f"iteration_{number}" / "model")
        write_json(directory / f"iteration_{number}" / "fine_tune.json", {"metrics": {}})
    return directory


def labels(*arguments) -> list[str]:
    return [subject.label for subject in subjects(*arguments, "", Decoding())]


def how(subject) -> tuple:
    return subject.decoding.chat_template, subject.decoding.compute_dtype, subject.decoding.seed


def test_a_run_has_its_newest_one_or_all_models(run):
    assert labels(str(run), "newest") == ["iteration 10"]
    assert labels(str(run), "2") == ["iteration 2"]
    assert labels(str(run), "0") == ["iteration 0 (base)"]
    assert labels(str(run), "all") == ["iteration 0 (base)", "iteration 1", "iteration 2", "iteration 10"]


def test_results_go_to_iterations_or_to_the_output(run, tmp_path):
    (subject,) = subjects(str(run), "2", "", Decoding())
    assert subject.output == run / "iteration_2"
    (subject,) = subjects(str(run), "2", str(tmp_path / "out"), Decoding())
    assert subject.output == tmp_path / "out" / "iteration_2"
    (subject,) = subjects(str(run / "iteration_2" / "model"), "newest", "", Decoding())
    assert str(subject.output) == "evaluations/model"


def test_models_of_a_run_are_asked_as_in_the_run_unless_told_otherwise(run):
    (subject,) = subjects(str(run), "newest", "", Decoding())
    assert how(subject) == ("chatml", "float32", 7)
    assert (subject.decoding.decode.max_length, subject.decoding.decode.kv_cache_dtype) == (128, "int8")
    assert subject.decoding.decode.slots == 0  # how fast, not what
    told = Decoding("plain", "bfloat16", 3, decode=DecodeConfig(max_length=64))
    (subject,) = subjects(str(run), "newest", "", told)
    assert how(subject) == ("plain", "bfloat16", 3)
    assert subject.decoding.decode.max_length == 64


def test_facts_change_with_weights_and_template(run):
    (subject,) = subjects(str(run), "1", "", Decoding())
    facts = subject.facts()
    weights = subject.directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = subject.facts()
    assert {name for name in facts if facts[name] != changed[name]} == {"weights"}
    other = dataclasses.replace(subject, decoding=dataclasses.replace(subject.decoding, chat_template="plain"))
    assert other.facts()["chat_template"] != facts["chat_template"]


@pytest.mark.parametrize(
    ("iterations", "message"),
    [
        ("3", "--iteration: .* has no model of iteration 3; it has 0 .the base., 1, 2, 10"),
        ("99", "no model of iteration 99"),
    ],
)
def test_missing_iterations_are_named(run, iterations, message):
    with pytest.raises(UserError, match=message):
        labels(str(run), iterations)


def test_only_runs_have_iterations(tmp_path):
    with pytest.raises(UserError, match="--all_iterations: tiny is not a run's directory"):
        labels("tiny", "all")
    with pytest.raises(UserError, match="--iteration: tiny is not a run's directory"):
        labels("tiny", "1")


def test_a_run_without_a_model_offers_its_base(run):
    for number in (1, 2, 10):
        shutil.rmtree(run / f"iteration_{number}")
    with pytest.raises(UserError, match="has no finished model yet; --iteration=0 is its base model"):
        labels(str(run), "newest")


def test_a_run_of_an_earlier_version_has_the_values_that_later_settings_changed_nothing_at(run):
    expected = labels(str(run), "newest")
    (run / "config.json").write_text('{"model": {"path": "tiny"}}')
    assert labels(str(run), "newest") == expected


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": {}}', "3"])
def test_settings_that_are_no_runs_are_refused_in_one_line(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not that of a run"):
        labels(str(run), "newest")
