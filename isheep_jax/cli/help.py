"""Renders `--help` of every command: its options, then the everyday settings, then the details section by section."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from isheep_jax.cli.options import CommandDescription, ConfigOptions
from isheep_jax.cli.settings import Setting, sections_of, written
from isheep_jax.config import EVERYDAY, Config
from isheep_jax.config_checks import RANGES, describe_range
from isheep_jax.named_configs import config_description, config_names
from isheep_jax.presets import PRESETS


def help_text(command: CommandDescription, options: Any) -> str:
    """Returns the text of `--help`. options: the values to show, which are the defaults or those of a named config."""
    settings = command.settings()
    takes_config = isinstance(options, ConfigOptions)
    own = {n: s for n, s in settings.items() if not (takes_config and s.path.startswith("settings."))}
    everyday = {name: own[name] for name in command.everyday or own}
    further = {name: setting for name, setting in own.items() if name not in everyday}
    lines = [
        f"{'usage:' if i == 0 else '      '} python -m {command.module} {form}" for i, form in enumerate(command.usage)
    ]
    lines += ["", *_wrapped(command.about)]
    if command.positional:
        words = ", ".join(f"{name.upper()} (--{name})" for name in command.positional)
        lines += ["", *_wrapped(f"Options that need no name, in this order: {words}.")]
    lines += _group("Options:", everyday.values(), options, command.ranges)
    lines += _group("Further options:", further.values(), options, command.ranges)
    if takes_config:
        lines += _config_settings(settings, options)
    if closing := command.closing():
        lines += ["", closing]
    return "\n".join(lines)


def _config_settings(settings: Mapping[str, Setting], options: ConfigOptions) -> list[str]:
    """Returns the named configs, the presets, and every setting of a config in two tiers."""
    chosen = " and ".join(f"'{name}'" for name in (options.config, options.preset) if name)
    values = f"the value that they have in {chosen}" if chosen else "their defaults, which a config may change"
    lines = ["", "Configs (--config=NAME):"]
    lines += [f"  {name}: {config_description(name).partition(chr(10))[0]}" for name in config_names()]
    lines += ["", "Presets (--preset=NAME), methods that are laid over the config:"]
    lines += [f"  {name}: {preset.description}" for name, preset in PRESETS.items()]
    everyday = [settings[name] for name in EVERYDAY if name in settings]
    lines += _group(f"Everyday settings, with {values}; a list is written with commas:", everyday, options, RANGES)
    details = [name for name, s in settings.items() if s.path.startswith("settings.") and name not in EVERYDAY]
    for section, names in by_section(details).items():
        title = f"{section}: {sections_of(Config)[section + '.']}" if section else "Further settings of the run:"
        lines += _group(title, [settings[name] for name in names], options, RANGES)
    return lines


def by_section(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the names by section, in their order; the section of those in none is ""."""
    sections: dict[str, list[str]] = {}
    for name in names:
        sections.setdefault(name.rpartition(".")[0], []).append(name)
    return sections


def _value_and_range(setting: Setting, options: Any, ranges: Mapping[str, str]) -> str:
    """Returns the setting's value and what it may be, such as "5e-05; above 0"."""
    value = written(setting.value_of(options)) or "empty"
    return f"{value}; {describe_range(ranges[setting.name])}" if setting.name in ranges else value


def _group(title: str, settings: Iterable[Setting], options: Any, ranges: Mapping[str, str]) -> list[str]:
    entries = []
    for setting in settings:
        head = f"--{setting.name}={setting.values}  ({_value_and_range(setting, options, ranges)})"
        entries += [*_wrapped(head, "  ", "      "), *_wrapped(setting.text, "      ", "      ")]
    return ["", *_wrapped(title), *entries] if entries else []


def _wrapped(text: str, first: str = "", indent: str = "") -> list[str]:
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(
            paragraph,
            width,
            initial_indent=first,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return lines
