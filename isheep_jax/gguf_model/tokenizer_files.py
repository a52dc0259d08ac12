"""Translates the tokenizer in the metadata of a GGUF file into the tokenizer files of a Hugging Face directory."""

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

from isheep_jax.errors import UserError, one_line
from isheep_jax.gguf_model.header import Header

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Kinds of tokenizer.ggml.pre whose texts are split by the expressions of Llama 3: a piece that is a token stays whole,
# and texts begin with the beginning-of-text token, unless the file says otherwise.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# What is known of byte-level vocabularies. transformers splits texts of any other kind as GPT-2 did, so that their ids
# would silently be wrong.
_KNOWN_PRE = (*_LLAMA3, "qwen2", "deepseek-r1-qwen", "smollm", "gpt-2")
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(header: Header) -> dict[str, bytes]:
    """Returns those of `TOKENIZER_FILES` that the metadata tells of; a chat template may be missing.

    transformers builds the tokenizer, so that its ids are those of transformers' own reader.
    Raises `UserError`, naming the file, for a kind of tokenizer that is not known.
    """
    metadata = header.metadata
    kind, pre = header.need("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in ("llama", "gpt2"):
        raise UserError(f"{header.path}: the tokenizer {kind!r} (tokenizer.ggml.model) is not read; llama and gpt2 are")
    if kind == "gpt2" and pre not in _KNOWN_PRE:
        raise UserError(
            f"{header.path}: the pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known; {', '.join(_KNOWN_PRE)} are"
        )
    tokens, ids = header.need("tokenizer.ggml.tokens"), {}
    for name, key in _TOKENS.items():
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and not 0 <= i < len(tokens):
            raise UserError(f"{header.path}: tokenizer.ggml.{key}_token_id={i} is outside of {len(tokens)} tokens")
        if i is not None:
            ids[name] = i
    tokenizer = _tokenizer_json(header)
    if kind == "gpt2" and pre in _LLAMA3:
        tokenizer["model"]["ignore_merges"] = True
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _LLAMA3)
    if adds_bos and "bos_token" in ids:
        tokenizer["post_processor"] = _after_bos(tokens[ids["bos_token"]], ids["bos_token"])
    config = {name: tokens[i] for name, i in ids.items()}
    texts = [json.dumps(tokenizer), json.dumps(config), metadata.get("tokenizer.chat_template")]
    return {name: text.encode() for name, text in zip(TOKENIZER_FILES, texts) if text is not None}


def _tokenizer_json(header: Header) -> dict[str, Any]:
    try:
        with _without_warnings():  # it warns that there is no torch, which nothing here needs
            from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    except ImportError:
        raise UserError(
            'the tokenizer of a GGUF file needs transformers 5.24 or newer: pip install "isheep_jax[gguf]"'
        ) from None
    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: f"tokenizer.{key}" for key, name in names.items()}
    values = {name: header.metadata[key] for name, key in known.items() if key in header.metadata}
    try:
        tokenizer, _ = convert_gguf_tokenizer(header.need("general.architecture"), values)
    except Exception as error:  # whatever a damaged vocabulary leads to
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{header.path}: its tokenizer cannot be read: {reason}") from None
    stored = json.loads(tokenizer.to_str())
    # transformers adds names that its classes begin with, such as GPT-2's end of text, to vocabularies without them.
    count = len(header.need("tokenizer.ggml.tokens"))
    return stored | {"added_tokens": [token for token in stored["added_tokens"] if token["id"] < count]}


def _after_bos(token: str, i: int) -> dict[str, Any]:
    """Returns the step of tokenizer.json that puts the beginning-of-text token before a text."""
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
