"""A model as it lies in a Hugging Face directory, checked as far as that is possible without reading its weights."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import find_tensors, load_parameters
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.sharding import ShardingRules
from isheep_jax.text.template_check import check_template
from isheep_jax.text.tokenizer import Tokenizer

# Of the files beside the weights, those that decide what a model is.
_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Pretrained:
    """A model directory, opened by `open_model`."""

    directory: epath.Path
    architecture: Architecture
    tokenizer: Tokenizer

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        return tuple(sorted({*self.tokenizer.eos_ids, *self.architecture.eos_token_ids}))

    def check_chat(self) -> None:
        """Raises `UserError` unless the model can be talked to and be trained on conversations."""
        check_template(self.tokenizer, self.end_ids)

    def digest(self) -> str:
        """sha256 of the directory's files, of those of the weights only their names and sizes."""
        digest = hashlib.sha256()
        for path in sorted(self.directory.iterdir(), key=lambda path: path.name):
            if path.suffix == ".safetensors":
                digest.update(f"{path.name} {path.stat().length}\n".encode())
            elif path.suffix in _SUFFIXES:
                data = path.read_bytes()
                digest.update(f"{path.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def load(self, *, mesh: Mesh, rules: ShardingRules, dtype: jnp.dtype) -> dict[str, Any]:
        """The parameters as `dtype`, sharded over `mesh` by `rules`. Raises `UserError` when a file cannot be read."""
        return load_parameters(self.directory, self.architecture, mesh=mesh, rules=rules, dtype=dtype)


def open_model(directory: epath.PathLike, chat_template: str = "auto") -> Pretrained:
    """Reads everything but the weights, of which only the files' headers.

    Raises `UserError`, one line that names the file, for whatever does not fit together: an unknown architecture,
    missing or misshapen tensors, truncated files, a tokenizer with more tokens than the model, no end token.
    """
    directory = epath.Path(directory)
    architecture = read_architecture(directory)
    find_tensors(directory, architecture)
    tokenizer = Tokenizer.load(directory, chat_template)
    model = Pretrained(directory, architecture, tokenizer)
    config = directory / "config.json"
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"{config}: vocab_size={architecture.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens"
        )
    beyond = [i for i in model.end_ids if not 0 <= i < architecture.vocab_size]
    if beyond:
        raise UserError(f"{config}: the end token {beyond[0]} is outside the vocabulary of {architecture.vocab_size}")
    if not model.end_ids:
        raise UserError(
            f"{config}: there is no end-of-sequence token (eos_token_id here or in generation_config.json, or "
            "eos_token in tokenizer_config.json), so that a completion would never end"
        )
    return model
