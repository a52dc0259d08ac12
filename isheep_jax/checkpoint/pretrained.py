"""Opens a Hugging Face directory or a GGUF file and checks what can be checked without reading the weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import Tensor, find_tensors, load_parameters
from isheep_jax.checkpoint.untrained import untrained
from isheep_jax.errors import UserError
from isheep_jax.gguf_model.files import is_gguf
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.quantization import StorageDtype
from isheep_jax.sharding import ShardingRules
from isheep_jax.text.template_check import check_shows_messages, check_template, fitting_templates, template_markers
from isheep_jax.text.tokenizer import Tokenizer

_WEIGHTS = (".safetensors", ".gguf")
# Suffixes of the files, besides the weights, that define a model.
_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# Bytes that are hashed at a time.
_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class Pretrained:
    """A model, opened by `open_model`.

    directory: a Hugging Face directory, or a GGUF file. tensors: where its tensors are, by name.
    """

    directory: epath.Path
    architecture: Architecture
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor] = field(repr=False)

    def with_weights(self, directory: epath.Path) -> "Pretrained":
        """Returns the model with the weights of another directory. Raises `UserError` as `find_tensors`."""
        return replace(self, directory=directory, tensors=find_tensors(directory, self.architecture))

    def check_chat(self) -> None:
        """Raises `UserError` unless the model can hold conversations and be trained on them."""
        check_template(self.tokenizer)

    def check_messages(self) -> None:
        """Raises `UserError` when the chat template, if there is one, leaves out what the user says."""
        if self.tokenizer.has_chat_template:
            check_shows_messages(self.tokenizer)

    def check_adapters(self) -> None:
        """Raises `UserError` where adapters cannot learn the chat template, since its markers were never trained."""

        def names(tokenizer: Tokenizer) -> list[str]:
            markers = template_markers(tokenizer)
            others = [i for i in tokenizer.control_ids if i not in markers and i < self.architecture.vocab_size]
            return [markers[i] for i in untrained(self.tensors, self.architecture, list(markers), others)]

        if not (never := names(self.tokenizer)):
            return
        others = [name for name in fitting_templates(self.tokenizer) if not names(self.tokenizer.with_template(name))]
        instead = f", or model.chat_template={' or '.join(others)}" if others else ""
        raise UserError(
            f"sft.method=lora leaves the embeddings as they are, and in {self.directory} those of {', '.join(never)} "
            "were never trained: they are all alike or near zero, so that the model would not learn to end its turns; "
            f"set sft.method=full{instead}"
        )

    def digest(self) -> str:
        """Returns the sha256 of the model's files; weights count by file name and size only."""
        digest = hashlib.sha256()
        for path in _files(self.directory):
            if path.suffix.lower() in _WEIGHTS:
                digest.update(f"{path.name} {path.stat().length}\n".encode())
            elif path.suffix in _SUFFIXES:
                data = path.read_bytes()
                digest.update(f"{path.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def load(
        self, *, mesh: Mesh, rules: ShardingRules, dtype: jnp.dtype, weights_dtype: StorageDtype = "model"
    ) -> dict[str, Any]:
        """Loads the parameters, see `load_parameters`, without reading the headers of the files again."""
        return load_parameters(
            self.directory,
            self.architecture,
            mesh=mesh,
            rules=rules,
            dtype=dtype,
            weights_dtype=weights_dtype,
            tensors=self.tensors,
        )


def weights_digest(directory: epath.Path) -> str:
    """Returns the sha256 of the weights with all files that say how they are used: config, tokenizer, template."""
    digest = hashlib.sha256()
    for path in model_files(directory):
        digest.update(f"{path.name} {path.stat().length}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def model_files(directory: epath.Path) -> list[epath.Path]:
    """Returns the files that define a model, in a fixed order: weights, config, tokenizer, templates."""
    return [path for path in _files(directory) if path.suffix.lower() in (*_WEIGHTS, *_SUFFIXES)]


def _files(directory: epath.Path) -> list[epath.Path]:
    return [directory] if is_gguf(directory) else sorted(directory.iterdir(), key=lambda path: path.name)


def open_model(directory: epath.PathLike, chat_template: str = "auto", *, weights: bool = True) -> Pretrained:
    """Reads a model directory or GGUF file except for the weights, of which it reads the file headers.

    weights: whether there must be any; without them there is nothing to load.

    Raises `UserError`, one line that names the file, for anything inconsistent: an unknown architecture, missing or
    misshapen tensors, truncated files, a tokenizer with more tokens than the model, no eos token.
    """
    directory = epath.Path(directory)
    architecture = read_architecture(directory)
    tensors = find_tensors(directory, architecture) if weights else {}
    tokenizer = Tokenizer.load(directory, chat_template, architecture.vocab_size)
    config = directory / "config.json"
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"{config}: vocab_size={architecture.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens"
        )
    outside = [i for i in tokenizer.eos_ids if i >= architecture.vocab_size]
    if outside:
        raise UserError(f"{config}: the eos token {outside[0]} is outside the vocabulary of {architecture.vocab_size}")
    if not tokenizer.eos_ids:
        raise UserError(
            f"{config}: there is no end-of-sequence token (eos_token_id here or in generation_config.json, or "
            "eos_token in tokenizer_config.json), so that a completion would never end"
        )
    return Pretrained(directory, architecture, tokenizer, tensors)
