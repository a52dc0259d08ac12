"""What an adapter's directory says of itself, read without JAX."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.text.json_files import read_json_object

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(directory: epath.Path) -> bool:
    """Returns whether a directory holds an adapter as `save_adapter` writes it, with the config of its model."""
    return all((directory / name).exists() for name in (ADAPTER_CONFIG, "config.json"))


def read_base(directory: epath.Path) -> str:
    """Returns the model that an adapter belongs to: a path, or a hub id such as "org/name@revision".

    Raises `UserError` when the adapter names none.
    """
    return base_of(directory, read_json_object(directory / ADAPTER_CONFIG))


def base_of(directory: epath.Path, settings: Mapping[str, Any]) -> str:
    """Returns what `read_base` returns. settings: what adapter_config.json in the directory says."""
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base or not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(f"{directory / ADAPTER_CONFIG}: base_model_name_or_path does not name the adapter's base")
    return f"{base}@{revision}" if revision else base
