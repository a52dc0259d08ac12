"""Reads the command line of every command into its dataclass of options, or says in one line what is wrong with it."""

import contextlib
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isheep_jax.cli.help import help_text
from isheep_jax.cli.options import CommandDescription, ConfigOptions
from isheep_jax.cli.settings import Setting
from isheep_jax.config import Config
from isheep_jax.config_checks import check_range, check_scheme, check_values
from isheep_jax.errors import UserError
from isheep_jax.loop.selection.rules import check_readings
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.presets import PRESETS, apply_preset, replace_settings
from isheep_jax.text_files import parse_json

# Options of single commands that are paths, or lists of them.
_PATHS = ("model", "run", "input", "pairs", "output", "results", "figure", "inspect_log", "compare", "table")


class Command(CommandDescription):
    """A command: its description, and how its command line is read."""

    def parse(self, arguments: Sequence[str]) -> Any:
        """Returns the options. `--help` prints every option and exits.

        Raises `UserError` for an unknown option (with the nearest name), a value of the wrong type or out of range, and
        an option that is missing.
        """
        settings = self.settings()
        wants_help = any(a in ("-h", "--help") for a in arguments)
        given = _given([a for a in arguments if a not in ("-h", "--help")], settings, self.positional)
        options = self.options()
        if issubclass(self.options, ConfigOptions):
            name, preset = (given.get(option, [""])[0] for option in ("config", "preset"))
            if not name and not wants_help and self.instead_of_config not in given:
                known = ", ".join(config_names())
                raise UserError(f"--config is missing: choose one of {known}; {self._for_example()}")
            options = replace(options, settings=_start(name, preset))
        values = {}
        for name, words in given.items():
            setting = settings[name]
            try:
                values[setting.path] = setting.parse(words)
            except (ValueError, KeyError):
                raise UserError(
                    f"--{name}: {','.join(words)!r} is not {setting.describe()}; for example: "
                    f"--{name}={setting.example(setting.value_of(options))}"
                ) from None
        options = replace_settings(options, values)
        if wants_help:
            print(help_text(self, options))
            sys.exit(0)
        self._check(options)
        return options

    def _check(self, options: Any) -> None:
        for name in self.required:
            if not getattr(options, name):
                raise UserError(f"--{name} is missing; {self._for_example()}")
        for name in _PATHS:
            given = getattr(options, name, ())
            for path in (given,) if isinstance(given, str) else given:
                check_scheme(f"--{name}", path)
        for name, interval in self.ranges.items():
            value = self.settings()[name].value_of(options)
            for number in value if isinstance(value, tuple) else (value,):
                check_range(name, number, interval)
        if isinstance(options, ConfigOptions) and options.config:
            # Imported here because only commands that take a config need the tasks.
            from isheep_jax.evaluation.tasks import check_stop, check_tasks

            check_values(options.settings)
            check_readings(options.settings)
            check_tasks(options.settings.evaluate)
            check_stop(options.settings)

    def _for_example(self) -> str:
        return f"for example: python -m {self.module} {self.example}"


def _start(config: str, preset: str) -> Config:
    """Returns the named config, or the defaults, with the preset's settings."""
    start = named_config(config) if config else Config()
    return apply_preset(preset, start) if preset else start


def _given(
    arguments: Sequence[str], settings: Mapping[str, Setting], positional: Sequence[str]
) -> dict[str, list[str]]:
    """Returns the words given for each setting; of a setting that is given twice, the last ones."""
    pairs: list[tuple[str, list[str]]] = []
    named = {word.partition("=")[0] for word in arguments}
    unnamed = [name for name in positional if f"--{name}" not in named]
    open_for = 0  # how many more words the last setting may take as values
    for word in arguments:
        _check_is_text(word, f"--{pairs[-1][0]}" if pairs else "")
        if not word.startswith("--"):
            if open_for == 0 and unnamed and not word.startswith("-"):
                pairs.append((unnamed.pop(0), [word]))
                continue
            if open_for == 0:
                raise UserError(f"'{word}' belongs to no setting; settings are written --section.field=value")
            pairs[-1][1].extend(_items(word) if open_for > 1 else [word])
            open_for -= 1
            continue
        _check_has_value(pairs, settings)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in settings:
            near = _nearest(name, settings)
            hint = f"did you mean --{near}? " if near else ""
            raise UserError(f"--{name}: there is no such setting; {hint}--help lists them all")
        is_list = settings[name].is_list
        pairs.append((name, (_items(value) if is_list else [value]) if equals else []))
        open_for = len(arguments) if is_list else int(not equals and settings[name].hint is not bool)
    _check_has_value(pairs, settings)
    return dict(pairs)


def _check_is_text(word: str, after: str) -> None:
    """Raises `UserError` for a word whose bytes are no text: Python hands them on as halves of surrogate pairs.

    after: the setting before the word, whose value it may be.
    """
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        name = word.partition("=")[0] if word.startswith("--") else after
        encoding = sys.getfilesystemencoding()
        hint = "" if encoding == "utf-8" else ", the encoding of this environment; PYTHONUTF8=1 makes it UTF-8"
        raise UserError(f"{name.encode('ascii', 'replace').decode()}: this is not text in {encoding}{hint}") from None


def _items(word: str) -> list[str]:
    """Returns the items of a list in one word: with commas between them, or a JSON array of texts that have commas."""
    if word.startswith("["):
        with contextlib.suppress(ValueError):
            items = parse_json(word)
            if all(isinstance(item, str) for item in items):
                return items
    return [item for item in word.split(",") if item]


def _check_has_value(pairs: Sequence[tuple[str, list[str]]], settings: Mapping[str, Setting]) -> None:
    """Raises `UserError` when the last setting has no value but needs one."""
    if not pairs:
        return
    name, words = pairs[-1]
    names = {"config": config_names, "preset": lambda: list(PRESETS)}
    if name in names and words in ([], [""]):
        raise UserError(f"--{name} needs a name: one of {', '.join(names[name]())}")
    if not words and settings[name].hint is not bool and not settings[name].is_list:
        raise UserError(f"--{name} needs {settings[name].describe()}: --{name}=...")


def _nearest(name: str, settings: Mapping[str, Setting]) -> str | None:
    # A user who forgets the section still gets the setting: learning_rate -> sft.learning_rate.
    same_field = [known for known in settings if known.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(name, same_field or settings, n=1, cutoff=0.0 if same_field else 0.6)
    return near[0] if near else None
