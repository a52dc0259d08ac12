"""Reads the text and JSON files of a model, a directory or a GGUF file that stands for one; errors name the file."""

from typing import Any

from etils import epath

from isheep_jax.errors import UserError, one_line
from isheep_jax.gguf_model.files import is_gguf, model_file
from isheep_jax.text_files import decoded, parse_json


def has_file(path: epath.Path) -> bool:
    """Returns whether a model has a file. path: the model's, "/" and the file's name."""
    return model_file(path.parent, path.name) is not None if is_gguf(path.parent) else path.exists()


def read_file(path: epath.Path) -> bytes:
    """Reads a file that a model has. Raises `UserError` when that fails."""
    if is_gguf(path.parent):
        return model_file(path.parent, path.name)
    if path.exists() and not path.is_file() and not path.is_dir():
        # Such as a pipe, which nobody may ever write to.
        raise UserError(f"{path} is no regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def read_text_file(path: epath.Path) -> str:
    """Reads a file. Raises `UserError` when it is not UTF-8."""
    return decoded(read_file(path), str(path))


def read_json_object(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file. Raises `UserError` when it is not a JSON object."""
    try:
        value = parse_json(read_text_file(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
