"""Settings: named configs, overrides, and what a misspelled or wrong one is answered with."""

import dataclasses
import inspect

import pytest

from isheep_jax import named_configs
from isheep_jax.cli.arguments import parse_config, parse_settings
from isheep_jax.config import Config, flatten
from isheep_jax.config_checks import RANGES, check_values
from isheep_jax.errors import UserError
from isheep_jax.named_configs import config_description, config_names, named_config


def parse(*arguments: str) -> Config:
    return parse_config(list(arguments), "isheep_jax.train")


def test_overrides_change_only_the_settings_they_name():
    config = parse(
        "--config=tiny", "--sft.learning_rate=1e-5", "--mesh.fsdp", "-1", "--workdir=/tmp/x y", "--seed", "7"
    )
    expected = flatten(named_config("tiny")) | {
        "sft.learning_rate": 1e-5, "mesh.fsdp": -1, "workdir": "/tmp/x y", "seed": 7,
    }  # fmt: skip
    assert flatten(config) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--respond.temperature=0.6,0.3"],
        ["--respond.temperature", "0.6", "0.3"],
        ["--respond.temperature=0.6", "0.3"],
    ],
)
def test_lists_are_written_with_commas_or_spaces(arguments):
    assert parse("--config=tiny", *arguments).respond.temperature == (0.6, 0.3)


def test_an_empty_list_switches_evaluation_off():
    assert parse("--config=tiny", "--evaluate.tasks=").evaluate.tasks == ()


@pytest.mark.parametrize(("value", "read"), [("=false", False), ("=true", True), ("", True), ("=False", False)])
def test_a_switch_within_a_section_is_written_as_true_or_false(value, read):
    assert parse("--config=tiny", f"--sft.packing{value}").sft.packing is read


def test_hyphens_are_read_as_underscores():
    assert parse("--config=tiny", "--sft.batch-size=2").sft.batch_size == 2


def test_the_last_of_two_values_holds():
    assert parse("--config=tiny", "--seed=1", "--seed=2").seed == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config", "tiny"]),
        (["--config"], ["--config", "needs a name"]),
        (["--config=tyni"], ["'tyni'", "did you mean 'tiny'"]),
        (["--config=tiny", "--sft.learning_rat=1"], ["--sft.learning_rat", "did you mean --sft.learning_rate"]),
        (["--config=tiny", "--learning_rate=1"], ["did you mean --sft.learning_rate"]),
        (["--config=tiny", "--sft.batch_size=1.5"], ["--sft.batch_size", "'1.5'", "a whole number"]),
        (["--config=tiny", "--sft.learning_rate=fast"], ["--sft.learning_rate", "'fast'", "a number"]),
        (
            ["--config=tiny", "--select.rule=best"],
            ["--select.rule", "'best'", "threshold, top_fraction, random, random_threshold"],
        ),
        (["--config=tiny", "--respond.temperature=a,b"], ["--respond.temperature", "'a,b'", "a number"]),
        (["--config=tiny", "--respond.temperature="], ["--respond.temperature", "empty"]),
        (["--config=tiny", "--select.fraction=3"], ["--select.fraction", "3.0", "above 0 and at most 1"]),
        (["--config=tiny", "--sft.learning_rate=nan"], ["--sft.learning_rate", "nan", "above 0"]),
        (["--config=tiny", "--sft.epochs"], ["--sft.epochs", "a whole number"]),
        (["--config=tiny", "stray"], ["'stray'", "--section.field=value"]),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(arguments, words):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


SERVER = ("--assess.judge=https://x/v1", "--assess.judge_model=m", "--assess.read=sampled")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (SERVER[:2], ["--assess.read", "sampled"]),
        (SERVER[::2], ["--assess.judge_model", "empty"]),
        ((*SERVER, "--select.rule=perplexity"), ["--select.rule", "perplexity", "a server"]),
        ((*SERVER, "--select.buckets=clusters"), ["--select.buckets", "clusters", "a server"]),
        (["--assess.samples=2"], ["--assess.samples", "--assess.read=sampled"]),
        (["--select.ranking=probability", "--assess.read=sampled"], ["--select.ranking", "--assess.read=expected"]),
        (["--select.ranking=probability", "--assess.level=none"], ["--select.ranking", "needs scores"]),
        (["--select.bucket_share=0.5", "--select.buckets=none"], ["--select.bucket_share", "--select.buckets"]),
        (["--assess.agreement=9", "--assess.level=none"], ["--assess.agreement", "--assess.level=none"]),
        (["--stop.measure=accuracy", "--evaluate.tasks="], ["--stop.measure", "--evaluate.tasks"]),
        (["--stop.measure=validation_loss"], ["--stop.measure", "--sft.validation_fraction"]),
        (["--select.threshold=-1.1"], ["--select.threshold", "at least -1"]),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_that_names_them(arguments, words):
    with pytest.raises(UserError) as error:
        parse("--config=tiny", *arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        SERVER,
        (*SERVER, "--select.rule=density", "--assess.judge=base"),
        ("--assess.samples=2", "--assess.read=sampled"),
        ("--select.ranking=probability",),
        ("--select.bucket_share=0.5",),
        ("--assess.agreement=9",),
        ("--stop.measure=accuracy",),
        ("--stop.measure=validation_loss", "--sft.validation_fraction=0.1"),
        ("--select.threshold=-1",),
    ],
)
def test_settings_that_do_are_taken(arguments):
    parse("--config=tiny", *arguments)


@dataclasses.dataclass(frozen=True)
class Switches:
    raw: bool = False
    text: str = ""


@pytest.mark.parametrize(("word", "value"), [("--raw", True), ("--raw=true", True), ("--raw=false", False)])
def test_switches_take_true_and_false_or_nothing(word, value):
    assert parse_settings(Switches, Switches(), [word, "--text", "-a b"], "m", "") == Switches(raw=value, text="-a b")


def test_a_switch_refuses_another_word():
    with pytest.raises(UserError, match="--raw: 'maybe' is not true or false"):
        parse_settings(Switches, Switches(), ["--raw=maybe"], "m", "")


@pytest.mark.parametrize("name", config_names())
def test_named_configs_pass_their_own_checks_and_say_their_command(name):
    config = named_config(name)
    check_values(config)
    assert config.name == name
    assert f"--config={name}" in config_description(name)


def test_every_range_belongs_to_a_setting():
    assert set(RANGES) <= set(flatten(Config()))


def test_every_setting_is_explained():
    def check(section):
        source = inspect.getsource(section)
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default_factory):
                check(field.default_factory)
                continue
            _, _, after = source.partition(f"    {field.name}: ")
            assert after.splitlines()[1].strip().startswith('"""'), f"{section.__name__}.{field.name}"

    check(Config)


def test_configs_are_found_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "isheep_jax" / "configs").mkdir(parents=True)
    (tmp_path / "isheep_jax" / "configs" / "mine.py").write_text(
        '"""Mine."""\nfrom isheep_jax.config import Config\n\n\ndef config():\n    return Config(name="mine")\n'
    )
    monkeypatch.setattr(named_configs, "__file__", str(tmp_path / "isheep_jax" / "named_configs.py"))
    assert config_names() == ["mine"]
    assert named_config("mine").name == "mine"
