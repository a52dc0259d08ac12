"""Opens a Hugging Face directory or a GGUF file and checks what can be checked without reading the weights."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from isheep_jax.checkpoint.adapters import Adapter, merged_into, merged_tensor, read_adapter
from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_save import TensorToWrite, new_checkpoint, split, write_files
from isheep_jax.checkpoint.hf_weights import Tensor, find_tensors, load_parameters, read_whole, tensor_names
from isheep_jax.checkpoint.kept_rows import KeptRows
from isheep_jax.checkpoint.untrained import untrained
from isheep_jax.errors import UserError
from isheep_jax.files import file_digests, sha256
from isheep_jax.gguf_model.files import is_gguf
from isheep_jax.model.architecture import Architecture, ParameterSpec, leaves, parameter_table
from isheep_jax.model.quantization import StorageDtype
from isheep_jax.sharding import ShardingRules
from isheep_jax.text.template_check import check_shows_messages, check_template, fitting_templates, template_markers
from isheep_jax.text.tokenizer import Tokenizer

_WEIGHTS = (".safetensors", ".gguf")
# Suffixes of the files, besides the weights, that define a model.
_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Pretrained:
    """A model, opened by `open_model`.

    directory: a Hugging Face directory, or a GGUF file. tensors: where its tensors are, by name. adapters: are merged
    into its weights when they are loaded, one after the other. kept: keeps the weights in the host's memory.
    """

    directory: epath.Path
    architecture: Architecture
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor] = field(repr=False)
    adapters: tuple[Adapter, ...] = ()
    kept: KeptRows | None = field(default=None, repr=False, compare=False)

    def with_weights(self, directory: epath.Path) -> "Pretrained":
        """Returns the model with the weights of another directory. Raises `UserError` as `find_tensors`."""
        return Pretrained(directory, self.architecture, self.tokenizer, find_tensors(directory, self.architecture))

    def with_adapter(self, directory: epath.Path) -> "Pretrained":
        """Returns the model with one adapter more. Raises `UserError` as `read_adapter`."""
        return replace(self, adapters=(*self.adapters, read_adapter(directory, self.architecture)))

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
        for path in (path for directory in self._directories for path in _files(directory)):
            if path.suffix.lower() in _WEIGHTS:
                digest.update(f"{path.name} {path.stat().length}\n".encode())
            elif path.suffix in _SUFFIXES:
                data = path.read_bytes()
                digest.update(f"{path.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def weights_digest(self, digest_of: Callable[[epath.Path], str] | None = None) -> str:
        """Returns the sha256 of the weights with all files that say how they are used: config, tokenizer, template.

        digest_of: in place of `weights_digest`, such as one that remembers that of the base.
        """
        digests = [(digest_of or weights_digest)(directory) for directory in self._directories]
        return digests[0] if len(digests) == 1 else sha256("".join(digests).encode())

    @property
    def _directories(self) -> list[epath.Path]:
        return [self.directory, *(adapter.directory for adapter in self.adapters)]

    def load(
        self, *, mesh: Mesh, rules: ShardingRules, dtype: jnp.dtype, weights_dtype: StorageDtype = "model"
    ) -> dict[str, Any]:
        """Loads the parameters, see `load_parameters`; with adapters, those that `save` would write, bit for bit."""

        def merged(name: str, spec: ParameterSpec, leaf: jax.Array) -> jax.Array:
            for adapter in self.adapters if spec.stacked else ():
                leaf = merged_into(leaf, name, adapter, mesh=mesh, rules=rules)
            return leaf.astype(dtype)

        return load_parameters(
            self.directory,
            self.architecture,
            mesh=mesh,
            rules=rules,
            dtype=self._merged_dtype or dtype,
            weights_dtype=weights_dtype,
            tensors=self.tensors,
            change=merged,
            kept=self.kept,
        )

    def save(self, directory: epath.PathLike, card: str | None) -> dict[str, str]:
        """Writes the model as a new Hugging Face directory, its adapters merged, and returns as `save_checkpoint`.

        Each process reads, merges and writes the tensors of its own files; none needs memory for more than a few.
        """
        dtype = self._merged_dtype or next(iter(self.tensors.values())).dtype
        device = jax.local_devices()[0]

        def make(name: str, layer: int, tensor: Tensor) -> jax.Array:
            array = jax.device_put(read_whole(tensor), device).astype(dtype)
            for adapter in self.adapters:
                array = merged_tensor(array, name, layer, adapter)
            return array

        tensors = [
            TensorToWrite(hf_name, spec.hf_shape, functools.partial(make, path[-1], layer, self.tensors[hf_name]))
            for path, spec in leaves(parameter_table(self.architecture))
            for layer, hf_name in enumerate(tensor_names(spec))
        ]
        with new_checkpoint(directory, self.architecture, self.tokenizer, dtype, card) as staging:
            return write_files(staging, split(tensors, dtype), dtype, together=False)

    @property
    def _merged_dtype(self) -> np.dtype | None:
        """The dtype that the weights had when the first adapter was trained on them."""
        return self.adapters[0].merged_dtype if self.adapters else None


def weights_digest(directory: epath.Path) -> str:
    """Returns the sha256 of the weights with all files that say how they are used: config, tokenizer, template."""
    paths = model_files(directory)
    lines = (f"{path.name} {digest}\n" for path, digest in zip(paths, file_digests(paths), strict=True))
    return sha256("".join(lines).encode())


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
    return Pretrained(directory, architecture, _open_tokenizer(directory, chat_template, architecture), tensors)


def open_adapter(directory: epath.PathLike, base: Pretrained, chat_template: str = "auto") -> Pretrained:
    """Returns the model that a run's adapter makes of its base, with the tokenizer that lies beside the adapter.

    Raises `UserError` as `open_model`, and for a base of another shape.
    """
    directory = epath.Path(directory)
    architecture = read_architecture(directory)
    if parameter_table(architecture) != parameter_table(base.architecture):
        raise UserError(f"{directory} is an adapter of another model than {base.directory}: their shapes differ")
    tokenizer = _open_tokenizer(directory, chat_template, architecture)
    return replace(base, architecture=architecture, tokenizer=tokenizer).with_adapter(directory)


def _open_tokenizer(directory: epath.Path, chat_template: str, architecture: Architecture) -> Tokenizer:
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
    return tokenizer
