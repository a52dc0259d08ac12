"""Finds the named configs: `configs/NAME.py` for `--config=NAME`."""

import ast
import importlib.util
import traceback
from pathlib import Path

from isheep_jax.config import Config
from isheep_jax.errors import UserError, did_you_mean, one_line


def configs_directory() -> Path:
    """Returns the directory of named configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Returns the names of all configs, sorted."""
    return sorted(p.stem for p in configs_directory().glob("*.py") if not p.stem.startswith("_"))


def named_config(name: str) -> Config:
    """Returns the config that `configs/NAME.py` returns from its `config()`.

    Raises `UserError` with the nearest name when there is no such file, and with file and line when the file fails.
    """
    path = configs_directory() / f"{name}.py"
    if name not in config_names():
        hint = did_you_mean(name, config_names())
        raise UserError(f"--config: there is no config '{name}'; {hint}known: {', '.join(config_names())}")
    return _run_file(path)


def config_description(name: str) -> str:
    """Returns the docstring of `configs/NAME.py`: command, hardware, memory and the result to expect.

    The file is not run, so that a mistake in one config does not end the help of the others.
    """
    try:
        text = ast.get_docstring(ast.parse((configs_directory() / f"{name}.py").read_bytes()))
    except (SyntaxError, ValueError) as error:
        return f"(cannot be read: {one_line(error)})"
    return text or "(no docstring)"


def _run_file(path: Path) -> Config:
    """Returns the result of the file's `config()`; whatever goes wrong in it is a `UserError` with its line."""
    spec = importlib.util.spec_from_file_location(f"isheep_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{place}: {one_line(error)}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: config() returns a {type(config).__name__}; it must return a Config")
    return config
