"""The schema of the settings, their ranges, what excludes what, and the named configs."""

import re
from typing import Literal, get_args, get_origin

import pytest

from isheep_jax import named_configs
from isheep_jax.cli.settings import settings_of
from isheep_jax.config import EVERYDAY, AssessConfig, Config, EvaluateConfig, flatten
from isheep_jax.config_checks import RANGES, check_values
from isheep_jax.errors import UserError
from isheep_jax.evaluation.judging import check_judge
from isheep_jax.loop.card import model_card
from isheep_jax.loop.prompting.methods import RESPOND_METHODS, SYNTHESIZE_METHODS
from isheep_jax.loop.selection.rules import RULES
from isheep_jax.named_configs import config_description, config_names, named_config
from isheep_jax.presets import replace_settings
from isheep_jax.text.chat_template import CHAT_TEMPLATES
from isheep_jax.train import COMMAND


def parse(*arguments: str) -> Config:
    return COMMAND.parse(arguments).settings


SERVER = ("--assess.judge=https://x/v1", "--assess.judge_model=m", "--assess.read=sampled")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (SERVER[:2], ["--assess.read", "sampled"]),
        (SERVER[::2], ["--assess.judge_model", "empty"]),
        ((*SERVER, "--assess.readings=lift"), ["--assess.readings", "lift", "a server"]),
        ((*SERVER, "--assess.framing=chat"), ["--assess.framing", "text"]),
        (["--assess.readings=lift,lift"], ["--assess.readings", "lift is there twice"]),
        (["--assess.readings=pairwise", "--respond.samples=1"], ["--assess.readings", "--respond.samples is 1"]),
        (["--assess.readings=lift", "--select.rule=threshold"], ["--select.rule", "threshold needs rubric"]),
        (["--select.rule=perplexity"], ["--select.rule", "perplexity needs likelihood in --assess.readings"]),
        (["--select.weights=1,2"], ["--select.weights", "2 weights for 1"]),
        (["--assess.readings=rubric,lift", "--select.weights=0,0"], ["--select.weights", "above 0"]),
        (["--select.weights=1", "--select.ranking=lexicographic"], ["--select.weights", "--select.ranking=sum"]),
        (["--select.weights=-1"], ["--select.weights", "at least 0"]),
        (["--select.consistency=0.9,0.1"], ["--select.consistency", "lowest and the highest"]),
        (["--select.consistency=0.9"], ["--select.consistency", "lowest and the highest"]),
        (["--select.consistency=0.1,0.9"], ["--select.consistency", "self_consistency in --assess.readings"]),
        (["--select.ranking=probability", "--assess.readings=rubric,lift"], ["--select.ranking", "rubric alone"]),
        ((*SERVER, "--select.buckets=clusters"), ["--select.buckets", "clusters", "a server"]),
        (["--assess.samples=2"], ["--assess.samples", "--assess.read=sampled"]),
        (["--select.ranking=probability", "--assess.read=sampled"], ["--select.ranking", "--assess.read=expected"]),
        (["--select.ranking=probability", "--assess.readings="], ["--select.ranking", "--assess.readings=rubric"]),
        (["--select.bucket_share=0.5", "--select.buckets=none"], ["--select.bucket_share", "--select.buckets"]),
        (["--assess.agreement=9", "--assess.readings="], ["--assess.agreement", "--assess.readings"]),
        (["--stop.measure=accuracy", "--evaluate.tasks="], ["--stop.measure", "--evaluate.tasks"]),
        (["--stop.measure=validation_loss"], ["--stop.measure", "--sft.validation_fraction"]),
        (["--select.threshold=-1.1"], ["--select.threshold", "at least -1"]),
        (["--synthesize.shots=5", "--synthesize.other_shots=3,5"], ["--synthesize.other_shots", "synthesize.shots=5"]),
        (["--synthesize.other_temperatures=0.7,0.7"], ["--synthesize.other_temperatures", "different"]),
        (["--synthesize.other_shots=0"], ["--synthesize.other_shots", "at least 1"]),
        (["--synthesize.method=retrieved", "--synthesize.choose=nearest"], ["--synthesize.choose", "--retrieval."]),
        (["--synthesize.method=retrieved", "--synthesize.other_shots=2"], ["--synthesize.other_shots", "retrieved"]),
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
        ("--assess.readings=", "--select.rule=threshold"),
        ("--assess.readings=lift,rubric,likelihood", "--select.weights=2,0,1"),
        ("--assess.readings=likelihood", "--select.rule=density_perplexity"),
        ("--assess.readings=self_consistency", "--respond.samples=2", "--select.consistency=0.1,0.9"),
        (*SERVER, "--assess.readings=rubric,self_consistency", "--respond.samples=2"),
        ("--stop.measure=accuracy",),
        ("--stop.measure=validation_loss", "--sft.validation_fraction=0.1"),
        ("--select.threshold=-1",),
    ],
)
def test_settings_that_do_are_taken(arguments):
    parse("--config=tiny", *arguments)


@pytest.mark.parametrize("name", config_names())
def test_named_configs_pass_their_own_checks_and_say_their_command(name):
    config = named_config(name)
    check_values(config)
    assert config.name == name
    assert f"--config={name}" in config_description(name)
    # Settings that stand side by side are given together.
    for together in re.findall(r"(?:--[a-z]\w*\.\w+=[\w-]+\s*)+", config_description(name)):
        parse(f"--config={name}", *together.split())


@pytest.mark.parametrize("table", [RANGES, EVERYDAY])
def test_tables_of_settings_name_settings(table):
    assert set(table) <= set(flatten(Config()))


def test_every_number_but_layouts_and_seeds_has_range():
    def numbers(setting):
        return {int, float} & {setting.hint, *get_args(setting.hint)}

    without = {name for name, setting in settings_of(Config).items() if numbers(setting) and name not in RANGES}
    assert without == {"seed", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.decode_tensor"}


# Numbers that only compare with something that is bounded itself.
COMPARED = (
    *("assess.agreement", "select.top_up_to", "select.max_pairs", "sft.warmup_steps", "sft.checkpoint_every"),
    *("evaluate.limit", "stop.patience"),
)


def test_a_count_beyond_all_use_is_refused_before_anything_is_paid_for():
    layout = [name for name in flatten(Config()) if name.startswith("mesh.") and name != "mesh.slices"]
    for setting in settings_of(Config).values():
        if setting.hint in (int, tuple[int, ...]) and setting.name not in (*COMPARED, *layout, "seed"):
            beyond = replace_settings(Config(), {setting.name: 10**12 if setting.hint is int else (10**12,)})
            with pytest.raises(UserError, match=f"--{setting.name}: "):
                check_values(beyond)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"synthesize.instructions": 10**7, "respond.samples": 2}, "--respond.samples: .* are 20,000,000 pairs"),
        ({"select.min_pairs": 10_001}, "--select.min_pairs: 10001 pairs cannot be kept of 10000 instructions"),
        ({"sft.batch_size": 10**6, "sft.sequence_length": 4096}, "--sft.batch_size: .*use at most 524,287"),
        ({"decode.slots": 10**5, "decode.max_length": 32_768}, "--decode.slots: .*use at most 65,535"),
    ],
)
def test_counts_whose_product_is_beyond_all_use_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check_values(replace_settings(Config(), settings))


def test_every_setting_and_section_is_explained():
    assert [name for name, setting in settings_of(Config).items() if not setting.text.endswith(".")] == []


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("model.chat_template", {"auto": None, **CHAT_TEMPLATES}),
        ("synthesize.method", SYNTHESIZE_METHODS),
        ("respond.method", RESPOND_METHODS),
        ("select.rule", RULES),
    ],
)
def test_choices_are_keys_of_their_table(name, table):
    assert set(get_args(settings_of(Config)[name].hint)) == set(table)


@pytest.mark.parametrize("name", [name for name, s in settings_of(Config).items() if get_origin(s.hint) is Literal])
def test_card_knows_every_choice_of_every_setting(name):
    cards = {
        choice: model_card(replace_settings(Config(), {name: choice}), 2, 100, 30)
        for choice in get_args(settings_of(Config)[name].hint)
    }
    if name in ("synthesize.method", "respond.method", "select.rule", "assess.readings", "sft.method"):
        assert len(set(cards.values())) == len(cards)


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """Returns a function that writes the file `configs/mine.py` of an installed package."""
    directory = tmp_path / "isheep_jax" / "configs"
    directory.mkdir(parents=True)
    monkeypatch.setattr(named_configs, "__file__", str(tmp_path / "isheep_jax" / "named_configs.py"))
    return (directory / "mine.py").write_text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def config(:\n", "mine.py, line 1: invalid syntax"),
        ("from isheep_jax.config import ModelConfig\n\n\ndef config():\n    return ModelConfig(pth='x')\n", "line 5: "),
        ("import nothing_of_this_name\n", "mine.py, line 1: No module named"),
        ("def config():\n    return 3\n", "config() returns a int; it must return a Config"),
        ("", "mine.py: module"),
    ],
)
def test_config_file_with_mistake_is_one_line_and_help_still_lists_it(own_configs, text, words):
    own_configs(text)
    with pytest.raises(UserError) as error:
        named_config("mine")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert config_description("mine").startswith("(")


def test_configs_are_found_inside_installed_package(own_configs):
    own_configs(
        '"""Mine."""\nfrom isheep_jax.config import Config\n\n\ndef config():\n    return Config(name="mine")\n'
    )
    assert config_names() == ["mine"]
    assert named_config("mine").name == "mine"
    assert config_description("mine") == "Mine."


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("judge", "key", "message"),
    [
        (f"http://me:{SECRET}@localhost/v1", "KEY", "--assess.judge: a user, a password or a query"),
        (f"http://localhost/v1?key={SECRET}", "KEY", "--assess.judge: a user, a password or a query"),
        ("http://localhost:port/v1", "KEY", "--assess.judge: it is no URL of a server"),
        ("http://", "KEY", "--assess.judge: it is no URL of a server"),
        ("http://[::1/v1", "KEY", "--assess.judge: it is no URL of a server"),
        ("http://a b/v1", "KEY", "--assess.judge: it is no URL of a server"),
        ("http://localhost/v1", f"sk-{SECRET}", "--assess.judge_key: it must be the name of an environment variable"),
        ("http://localhost/v1", f"{SECRET}0123456789abcdef", "--assess.judge_key: it must be the name"),
        ("http://localhost/v1", "", "--assess.judge_key: it must be the name"),
    ],
)
def test_a_secret_in_the_settings_is_refused_and_not_shown(judge, key, message):
    assess = AssessConfig(judge=judge, judge_model="m", judge_key=key, read="sampled")
    with pytest.raises(UserError, match=message) as error:
        check_values(Config(assess=assess))
    assert SECRET not in str(error.value)
    evaluate = EvaluateConfig(judge=judge, judge_model="m", judge_key=key)
    with pytest.raises(UserError, match=message.replace("assess", "evaluate")):
        check_judge(evaluate)


@pytest.mark.parametrize("key", ["OPENAI_API_KEY", "_key2", "MY_VERY_LONG_NAME_OF_A_KEY_2"])
def test_a_server_by_its_url_and_the_name_of_a_variable_is_good(key):
    assess = AssessConfig(judge="https://[::1]:8000/v1/", judge_model="m", judge_key=key, read="sampled")
    check_values(Config(assess=assess))
