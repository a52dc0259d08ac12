"""--help of every command: all options with their texts, everyday settings before the details, and without jax."""

import re
import subprocess
import sys

import pytest

from isheep_jax import benchmark, evaluate, export, fetch, generate, judge, plan, study, train
from isheep_jax.cli.settings import settings_of
from isheep_jax.config import EVERYDAY, Config
from isheep_jax.presets import PRESETS

MODULES = (benchmark, evaluate, export, fetch, generate, judge, plan, study, train)
COMMANDS = {command.COMMAND.module: command for command in MODULES}


def help_of(command, *arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", COMMANDS)
def test_help_shows_and_explains_every_setting(module, capsys):
    command = COMMANDS[module]
    text = help_of(command, capsys=capsys)
    words = " ".join(text.split())
    assert text.startswith(f"usage: python -m {module} ")
    for setting in command.COMMAND.settings().values():
        assert setting.text
        assert len(re.findall(rf"^  --{re.escape(setting.name)}=", text, re.MULTILINE)) == 1
        assert setting.text in words


def test_help_lists_everyday_settings_before_details(capsys):
    text = help_of(train, capsys=capsys)
    names = re.findall(r"^  --([\w.]+)=", text, re.MULTILINE)
    own = [name for name in train.COMMAND.settings() if name not in settings_of(Config)]
    assert own[:2] == ["config", "preset"]
    assert names[: len(own)] == own
    assert names[len(own) :][: len(EVERYDAY)] == list(EVERYDAY)
    assert set(names[len(own) :]) == set(settings_of(Config))


def test_help_shows_values_of_chosen_config(capsys):
    text = help_of(train, "--config=tiny", capsys=capsys)
    assert "  --sft.learning_rate=FLOAT  (0.0003; above 0 and at most 1)\n" in text
    assert "in 'tiny'" in text


def test_help_lists_configs_presets_and_studies_with_their_rows(capsys):
    text = help_of(study, capsys=capsys)
    assert "  tiny: The whole loop on the embedded model" in text
    assert all(f"  {name}: {preset.description}\n" in text for name, preset in PRESETS.items())
    assert "  iterative_settings: Iterative settings (one_base, one_last, total_base, total_last, direct_2" in text


def test_help_names_options_that_need_no_name(capsys):
    text = help_of(export, capsys=capsys)
    assert "usage: python -m isheep_jax.export RUN OUTPUT" in text
    assert "RUN (--run), OUTPUT (--output)" in text


def test_help_answers_without_importing_jax():
    code = (
        "import contextlib, importlib, io, sys\n"
        "for module in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        importlib.import_module(module).main(['--help'])\n"
        "assert not {'jax', 'transformers', 'grain', 'orbax'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *(module for module in COMMANDS if module != "isheep_jax.export")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_generate_does_not_import_training_stack(small_checkpoint):
    code = (
        "import sys\nfrom isheep_jax.generate import main\nmain(sys.argv[1:])\n"
        "stack = {'grain', 'optax', 'isheep_jax.sft.trainer'}\n"
        "assert not stack & set(sys.modules), stack & set(sys.modules)"
    )
    arguments = ["--model", str(small_checkpoint), "--prompt", "hello", "--max_tokens=2"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
