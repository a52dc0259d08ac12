"""Shared by the commands: settings from the command line, and trouble told in one line."""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import tyro

from isheep_jax.config import Config
from isheep_jax.config_checks import check_values
from isheep_jax.errors import UserError
from isheep_jax.loop.selection.rules import check_judge
from isheep_jax.named_configs import config_description, config_names, named_config
from isheep_jax.presets import PRESETS, apply_preset

Settings = TypeVar("Settings")


def parse_config(arguments: Sequence[str], module: str) -> Config:
    """`--config=NAME --preset=NAME --section.field=value ...` as a `Config`; `--help` prints every setting and exits.

    A preset changes the config, and single settings change both, in whatever order they are written. Raises `UserError`
    for an unknown config, preset or setting (with the nearest name) and for a value of the wrong type or out of range.
    """
    name, rest = _take("--config", config_names(), arguments)
    preset, rest = _take("--preset", list(PRESETS), rest)
    listing = "\n".join(f"  {n}: {config_description(n).partition(chr(10))[0]}" for n in config_names())
    presets = "\n".join(f"  {n}: {p.description}" for n, p in PRESETS.items())
    chosen = " and ".join(f"'{n}'" for n in (name, preset) if n)
    description = (
        f"python -m {module} --config=NAME [--preset=NAME] [--section.field=value ...]\n\n"
        f"Configs (--config=NAME):\n{listing}\n\n"
        f"Presets (--preset=NAME), methods that are laid over the config:\n{presets}\n\n"
        "Every setting, with the value that it has "
        + (f"in {chosen}" if chosen else "unless the config says otherwise")
        + ". A list is written with commas."
    )
    wants_help = any(a in ("-h", "--help") for a in rest)
    if name is None and not wants_help:
        known = config_names()
        example = "tiny" if "tiny" in known else known[0]
        raise UserError(
            f"--config is missing: choose one of {', '.join(known)}; for example: python -m {module} --config={example}"
        )
    config = named_config(name) if name else Config()
    if preset:
        config = apply_preset(preset, config)
    config = parse_settings(Config, config, rest, module, description)
    check_values(config)
    check_judge(config)
    return config


def parse_settings(
    kind: type[Settings],
    default: Settings,
    arguments: Sequence[str],
    module: str,
    description: str,
    positional: Sequence[str] = (),
) -> Settings:
    """Overrides the fields of the dataclass `default` with `--field=value` (nested: `--section.field=value`).

    positional: settings whose values may also be given without their names, in this order. Raises `UserError` for what
    is not a setting or has the wrong type.
    """
    if any(a in ("-h", "--help") for a in arguments):
        if positional:
            words = ", ".join(f"{name.upper()} (--{name})" for name in positional)
            description = f"{description}\n\nWithout their names, in this order: {words}."
        tyro.cli(
            kind,
            prog=" ".join([f"python -m {module}", *map(str.upper, positional)]),
            description=description,
            args=["--help"],
            default=default,
            use_underscores=True,
        )
    types = _setting_types(kind)
    for name, values in _split(arguments, types, positional):
        is_list = typing.get_origin(types[name]) is tuple
        if types[name] is bool:
            section, dot, field = name.rpartition(".")
            switches = {"true": f"--{name}", "false": f"--{section}{dot}no_{field}"}
            words = [switches.get((values or ["true"])[0].lower(), f"--{name}=?")]
        else:
            words = [f"--{name}", *values] if is_list else [f"--{name}={values[0]}"]
        try:
            # One setting at a time, so that the one which fails can be named in one line instead of tyro's box.
            with contextlib.redirect_stderr(io.StringIO()):
                default = tyro.cli(kind, args=words, default=default, use_underscores=True)
        except SystemExit:
            raise UserError(
                f"--{name}: {','.join(values)!r} is not {_describe(types[name])}; for example: "
                f"--{name}={_example(types[name], _lookup(default, name))}"
            ) from None
    return default


def run_command(main: Callable[[list[str]], None], module: str) -> int:
    """Runs a command's `main` on the command line; returns the exit code (2: bad input, 130: Ctrl-C)."""
    arguments = sys.argv[1:]
    # transformers is here for its tokenizers; that it finds no PyTorch is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        main(arguments)
        return 0
    except BaseException as error:
        code = report_error(error, module, arguments)
        if code is None:
            raise
        return code


def report_error(error: BaseException, module: str, arguments: Sequence[str]) -> int | None:
    """Tells a person of an error in one line, and returns the exit code; None for one that needs a traceback."""
    if isinstance(error, UserError):
        return _fail(str(error))
    if isinstance(error, KeyboardInterrupt):
        print(f"\nstopped; the same command goes on from here: {command_line(module, arguments)}", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (as in `| head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.filename is not None:
        return _fail(f"{error.filename}: {error.strerror}")
    return None


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as a person would type it again."""
    return shlex.join(["python", "-m", module, *arguments])


def disk_is_full(error: BaseException) -> bool:
    """Whether `error`, or one that led to it, says that a disk is full (libraries wrap it in errors of their own)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _take(option: str, known: Sequence[str], arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The name that `option` gives, or None, and the other arguments. known: the names, for the message."""
    name, rest = None, []
    words = iter(arguments)
    for word in words:
        if word == option:
            name = next(words, "")
        elif word.startswith(f"{option}="):
            name = word.removeprefix(f"{option}=")
        else:
            rest.append(word)
            continue
        if not name or name.startswith("-"):
            raise UserError(f"{option} needs a name: one of {', '.join(known)}")
    return name, rest


def _setting_types(kind: type, prefix: str = "") -> dict[str, object]:
    types: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            types |= _setting_types(hint, f"{prefix}{name}.")
        else:
            types[prefix + name] = hint
    return types


def _split(
    arguments: Sequence[str], types: dict[str, object], positional: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """Each setting with its values, in the order of the command line."""
    settings: list[tuple[str, list[str]]] = []
    given = {word.partition("=")[0] for word in arguments}
    unnamed = [name for name in positional if f"--{name}" not in given]
    open_for = 0  # how many more words the last setting may take as values
    for word in arguments:
        if not word.startswith("--"):
            if open_for == 0 and unnamed and not word.startswith("-"):
                settings.append((unnamed.pop(0), [word]))
                continue
            if open_for == 0:
                raise UserError(f"'{word}' belongs to no setting; settings are written --section.field=value")
            settings[-1][1].extend(word.split(",") if open_for > 1 else [word])
            open_for -= 1
            continue
        _check_has_value(settings, types)
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in types:
            near = _nearest(name, types)
            hint = f"did you mean --{near}? " if near else ""
            raise UserError(f"--{name}: there is no such setting; {hint}--help lists them all")
        is_list = typing.get_origin(types[name]) is tuple
        values = (value.split(",") if is_list else [value]) if equals else []
        settings.append((name, [v for v in values if v] if is_list else values))
        open_for = len(arguments) if is_list else int(not equals and types[name] is not bool)
    _check_has_value(settings, types)
    return settings


def _check_has_value(settings: list[tuple[str, list[str]]], types: dict[str, object]) -> None:
    if settings and not settings[-1][1]:
        name = settings[-1][0]
        if types[name] is not bool and typing.get_origin(types[name]) is not tuple:
            raise UserError(f"--{name} needs {_describe(types[name])}: --{name}=...")


def _nearest(name: str, types: dict[str, object]) -> str | None:
    # A person who forgets the section still gets the setting: learning_rate -> sft.learning_rate.
    same_field = [known for known in types if known.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    candidates = same_field or list(types)
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0 if same_field else 0.6)
    return near[0] if near else None


def _describe(hint: object) -> str:
    if hint is int:
        return "a whole number"
    if hint is float:
        return "a number"
    if hint is bool:
        return "true or false"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list (with commas) whose items are each {_describe(typing.get_args(hint)[0])}"
    return "a text"


def _example(hint: object, value: object) -> object:
    if typing.get_origin(hint) is not tuple:
        return str(value).lower() if hint is bool else value
    item = typing.get_args(hint)[0]
    return ",".join(map(str, value)) or (typing.get_args(item)[0] if typing.get_origin(item) is Literal else "")


def _lookup(settings: object, name: str) -> object:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings
