"""Command lines: how settings are written, and what a misspelled, missing or wrong one is answered with."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.settings import WITHOUT_PREFIX, written
from isheep_jax.config import Config, flatten
from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.train import COMMAND


def parse(*arguments: str) -> Config:
    return COMMAND.parse(arguments).settings


def test_overrides_change_only_settings_they_name():
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


def test_empty_list_switches_evaluation_off():
    assert parse("--config=tiny", "--evaluate.tasks=").evaluate.tasks == ()


@pytest.mark.parametrize(("value", "read"), [("=false", False), ("=true", True), ("", True), ("=False", False)])
def test_switch_within_section_is_written_as_true_or_false(value, read):
    assert parse("--config=tiny", f"--sft.packing{value}").sft.packing is read


def test_hyphens_are_read_as_underscores():
    assert parse("--config=tiny", "--sft.batch-size=2").sft.batch_size == 2


def test_last_of_two_values_holds():
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
def test_bad_setting_is_one_line_that_names_it(arguments, words):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@dataclass(frozen=True)
class Inner:
    """Settings of a section."""

    size: int = 3
    """How large (count)."""
    kind: Literal["round", "square"] = "round"
    """Which form."""


@dataclass(frozen=True)
class Switches:
    raw: bool = False
    """Whether it is raw."""
    text: str = ""
    """What it says."""
    words: tuple[str, ...] = ()
    """What else."""
    flat: Inner = field(default_factory=Inner, metadata=WITHOUT_PREFIX)
    section: Inner = field(default_factory=lambda: Inner(size=9))


SWITCHES = Command(
    module="m",
    options=Switches,
    usage=("TEXT",),
    about="Does nothing.",
    example="hello",
    positional=("text",),
    required=("text",),
    everyday=("text", "size"),
    hidden=("section.kind",),
    ranges={"size": "[1, 5)"},
    closing=lambda: "The end.",
)


@pytest.mark.parametrize(("word", "value"), [("--raw", True), ("--raw=true", True), ("--raw=false", False)])
def test_switches_take_true_and_false_or_nothing(word, value):
    assert SWITCHES.parse([word, "--text", "-a b"]) == Switches(raw=value, text="-a b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--words=a,b"], ("a", "b")),
        (["--words=a, b"], ("a", " b")),
        (['--words=["a, b", "c\\n"]'], ("a, b", "c\n")),
        (["--words", '["a, b"]', "c"], ("a, b", "c")),
        (["--words=[INST],b"], ("[INST]", "b")),
        (["--words=[1]"], ("[1]",)),
        (["--words=[]"], ()),
    ],
)
def test_items_of_a_list_that_have_commas_are_written_as_json(arguments, words):
    assert SWITCHES.parse(["hello", *arguments]).words == words
    assert SWITCHES.parse(["hello", f"--words={written(words)}"]).words == words


def test_switch_refuses_another_word():
    with pytest.raises(UserError, match="--raw: 'maybe' is not true or false"):
        SWITCHES.parse(["--raw=maybe"])


def test_sections_without_prefix_are_read_and_shown_like_other_options():
    options = SWITCHES.parse(["hello", "--size=4", "--section.size=10"])
    assert options == Switches(text="hello", flat=Inner(size=4), section=Inner(size=10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text is missing; for example: python -m m hello"),
        (["hello", "--size=5"], "--size: 5 is out of range; it must be at least 1 and below 5"),
        (["hello", "--kind=oval"], "--kind: 'oval' is not one of round, square; for example: --kind=round"),
        (["hello", "--section.kind=square"], "--section.kind: there is no such setting; did you mean --kind?"),
        (["hello", "more"], "'more' belongs to no setting"),
    ],
)
def test_bad_options_of_command_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        SWITCHES.parse(arguments)


def test_options_of_config_start_from_preset_and_single_settings_change_both():
    options = COMMAND.parse(["--select.threshold=6", "--preset=i_sheep", "--config=tiny"])
    assert (options.config, options.preset) == ("tiny", "i_sheep")
    assert options.settings.select == replace(options.settings.select, threshold=6.0, max_pairs_order="first")
    assert options.settings.model == named_config("tiny").model
