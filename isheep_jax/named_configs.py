"""Finds the named configs: `configs/NAME.py` for `--config=NAME`."""

import difflib
import importlib.util
import inspect
from pathlib import Path

from isheep_jax.config import Config
from isheep_jax.errors import UserError


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

    Raises `UserError` with the nearest name when there is no such file.
    """
    path = configs_directory() / f"{name}.py"
    if name not in config_names():
        near = difflib.get_close_matches(name, config_names(), n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"--config: there is no config '{name}'; {hint}known: {', '.join(config_names())}")
    return _load(path).config()


def config_description(name: str) -> str:
    """Returns the docstring of `configs/NAME.py`: command, hardware, memory and the result to expect."""
    return inspect.cleandoc(_load(configs_directory() / f"{name}.py").__doc__ or "")


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(f"isheep_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
