"""The small files that a GGUF file stands for, made when they are asked for and held in memory."""

import functools
import json

from etils import epath

from isheep_jax.gguf_model.config_json import config_json
from isheep_jax.gguf_model.header import Header, read_header
from isheep_jax.gguf_model.tokenizer_files import TOKENIZER_FILES, tokenizer_files


def is_gguf(path: epath.Path) -> bool:
    """Returns whether a path is that of a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def model_file(path: epath.Path, name: str) -> bytes | None:
    """Returns a file of the Hugging Face directory that a GGUF file stands for, such as config.json; None: it has none.

    Raises `UserError`, one line that names the GGUF file, when that is damaged or of an unknown kind.
    """
    make = _config if name == "config.json" else _tokenizer if name in TOKENIZER_FILES else None
    if make is None:
        return None
    stat = path.stat()
    return make(path, stat.length, stat.mtime).get(name)


# A model and a judge are open at once. A file that has changed is read again.
@functools.lru_cache(maxsize=2)
def _header(path: epath.Path, length: int, mtime: float) -> Header:
    return read_header(path)


@functools.lru_cache(maxsize=2)
def _config(path: epath.Path, length: int, mtime: float) -> dict[str, bytes]:
    return {"config.json": json.dumps(config_json(_header(path, length, mtime))).encode()}


@functools.lru_cache(maxsize=2)  # a large vocabulary takes seconds
def _tokenizer(path: epath.Path, length: int, mtime: float) -> dict[str, bytes]:
    return tokenizer_files(_header(path, length, mtime))
