"""Reads the text and JSON files of a model, a directory or a GGUF file that stands for one; errors name the file."""

import json
from typing import Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.gguf_model.files import is_gguf, model_file


def has_file(path: epath.Path) -> bool:
    """Returns whether a model has a file. path: the model's, "/" and the file's name."""
    return model_file(path.parent, path.name) is not None if is_gguf(path.parent) else path.exists()


def read_file(path: epath.Path) -> bytes:
    """Reads a file that a model has."""
    return model_file(path.parent, path.name) if is_gguf(path.parent) else path.read_bytes()


def read_text_file(path: epath.Path) -> str:
    """Reads a file. Raises `UserError` when it is not UTF-8."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def read_json_object(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file. Raises `UserError` when it is not a JSON object."""
    try:
        value = json.loads(read_text_file(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
