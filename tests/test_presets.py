"""Presets: what each sets, what none of them touches, and how they meet configs and single settings."""

import re
from pathlib import Path

import pytest

from isheep_jax.config import Config, ModelConfig, flatten
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.presets import PRESETS, apply_preset, replace_settings
from isheep_jax.train import COMMAND

# Where a run takes place, what it starts from and how it is measured: no business of a method.
UNTOUCHED = (
    *("name", "workdir", "seed", "prompts", "synthesize.seeds", "sft.remat"),
    *(name for name in flatten(Config()) if name.startswith(("model.", "mesh.", "decode.", "evaluate."))),
)

# Where I-SHEEP's text or code gives a value (arXiv 2408.08072 v3: section 3, section 5.4, appendix E).
PUBLISHED = {
    "synthesize.instructions": 10_000,
    "synthesize.shots": 5,
    "synthesize.temperature": 1.0,
    "synthesize.top_p": 0.95,
    "synthesize.max_tokens": 1000,
    "synthesize.novelty": 0.7,
    "synthesize.novelty_scope": "iteration",
    "synthesize.turns": 1,
    "respond.samples": 1,
    "respond.temperature": [1.0],
    "respond.top_p": 0.95,
    "respond.max_tokens": 1000,
    "respond.base_prompt": "bare",
    "assess.readings": ["rubric"],
    "assess.level": "both",
    "assess.framing": "text",
    "assess.prompt": "standard",
    "assess.judge": "base",
    "assess.read": "sampled",
    "assess.samples": 1,
    "assess.parser": "paper",
    "assess.temperature": 1.0,
    "assess.top_p": 0.95,
    "assess.max_tokens": 1000,
    "select.rule": "threshold",
    "select.threshold": 8.0,
    "select.max_pairs": 3000,
    "select.max_pairs_order": "first",
    "guard.action": "off",
    "sft.start": "base",
    "sft.data": "iteration",
    "sft.method": "lora",
    "sft.lora_rank": 8,
    "sft.lora_alpha": 16.0,
    "sft.lora_dropout": 0.05,
    "sft.learning_rate": 5e-5,
    "sft.warmup_steps": 20,
    "sft.epochs": 2,
    "sft.sequence_length": 1024,
    "sft.batch_size": 16,
    "sft.packing": False,
    "sft.validation_fraction": 0.1,
    "sft.checkpoint_every": 100,
    "stop.measure": "none",
}


def parse(*arguments: str) -> Config:
    return COMMAND.parse(arguments).settings


@pytest.mark.parametrize("start", [Config(), named_config("tiny")], ids=["defaults", "tiny"])
def test_i_sheep_gives_every_setting_published_value(start):
    settings = flatten(apply_preset("i_sheep", start))
    assert {name: settings[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
def test_preset_leaves_models_devices_and_measurements_alone(name):
    start = replace_settings(named_config("tiny"), {"seed": 7, "workdir": "w", "synthesize.seeds": "mine.jsonl"})
    before, after = flatten(start), flatten(apply_preset(name, start))
    assert {n: after[n] for n in UNTOUCHED} == {n: before[n] for n in UNTOUCHED}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_settings_go_together(name):
    check_values(apply_preset(name, Config(model=ModelConfig("somewhere"))))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_laid_over_itself_changes_nothing(name):
    once = apply_preset(name, named_config("tiny"))
    assert apply_preset(name, once) == once


def test_i_sheep_leaves_nothing_of_another_method():
    def method(config):
        return {n: v for n, v in flatten(apply_preset("i_sheep", config)).items() if n not in UNTOUCHED}

    changed = replace_settings(
        named_config("tiny"), {"assess.agreement": 9, "synthesize.turns": 2, "select.top_up_to": 7}
    )
    assert method(changed) == method(Config())


@pytest.mark.parametrize("order", ["preset first", "setting first"])
def test_single_settings_hold_against_preset(order):
    arguments = ["--preset=i_sheep", "--select.threshold=6"]
    config = parse("--config=tiny", *(arguments if order == "preset first" else reversed(arguments)))
    assert config == replace_settings(apply_preset("i_sheep", named_config("tiny")), {"select.threshold": 6.0})


def test_preset_may_stand_before_config():
    assert parse("--preset", "i_sheep", "--config", "tiny") == parse("--config=tiny", "--preset=i_sheep")


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--preset=i_shep", ["'i_shep'", "did you mean 'i_sheep'"]), ("--preset=", ["--preset needs a name", "i_sheep"])],
)
def test_unknown_preset_is_answered_with_nearest(argument, words):
    with pytest.raises(UserError) as error:
        parse("--config=tiny", argument)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_replaced_settings_are_named_as_on_command_line():
    config = replace_settings(Config(), {"iterations": 9, "sft.epochs": 1})
    assert {n: v for n, v in flatten(config).items() if v != flatten(Config())[n]} == {"iterations": 9, "sft.epochs": 1}


@pytest.mark.parametrize("name", [n for n in config_names() if re.match("llama|qwen3|qwen1_5", n)])
def test_named_configs_of_papers_models_are_faithful(name):
    config = named_config(name)
    published = flatten(apply_preset("i_sheep", config))
    differs = {n for n, value in flatten(config).items() if value != published[n]}
    # What follows a judgment's number is never read, and a guard that only warns changes nothing.
    assert differs <= {"assess.max_tokens", "guard.action"}
    billions = float(re.search(r"(?:llama|qwen3|qwen1_5)_([\d_]+)b", name)[1].replace("_", "."))
    # Llama 3 70B had three iterations (table 5), Qwen1.5 three, four or six by size (table 1).
    assert config.iterations == (3 if billions <= 14 or name.startswith("llama") else 4 if billions == 32 else 6)


DOCS = Path(__file__).parent.parent / "docs"


def test_documentation_names_every_preset():
    readme = (DOCS.parent / "README.md").read_text()
    assert [name for name in PRESETS if f"--preset={name}" not in readme] == []


def test_every_setting_on_page_about_paper_is_one():
    page = (DOCS / "reproduce.md").read_text()
    cells = [cell for row in page.splitlines() if row.startswith("|") for cell in row.split("|")]
    commands = [text for cell in cells for text in re.findall(r"`(--[^`]+=[^`]+)`", cell)]
    # In a cell such as "`--select.rule=density`, `perplexity`" the further words are more of its values.
    for cell in cells:
        if found := re.match(r" `(--[a-z_.]+)=\S+`, ", cell):
            commands += [f"{found[1]}={value}" for value in re.findall(r"`([a-z_0-9]+)`", cell)]
    commands = [c for c in commands if not c.endswith(("=DIRECTORY", "=FILE"))]
    assert len(commands) > 30
    for command in commands:
        parse(*command.split(), *(() if "--config" in command else ("--config=tiny",)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("select.fractoin", "'fractoin' is not a setting of SelectConfig; did you mean 'fraction'?"),
        ("selct.fraction", "'selct.fraction' is not a setting of Config; did you mean 'select'?"),
        ("seed.fraction", "'seed.fraction' is not a setting of Config"),
    ],
)
def test_setting_that_does_not_exist_is_named_with_nearest(name, words):
    with pytest.raises(UserError, match=re.escape(words)):
        replace_settings(Config(), {name: 1})
