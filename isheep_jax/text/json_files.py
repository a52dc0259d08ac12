"""Reads the text and JSON files of a model directory; errors name the file."""

import json
from typing import Any

from etils import epath

from isheep_jax.errors import UserError


def read_text_file(path: epath.Path) -> str:
    """Reads a file. Raises `UserError` when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
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
