"""Converts a SentencePiece BPE model to a tokenizer.json that gives the same ids.

transformers' own conversion registers user-defined symbols as special text outside the normalizer, so that a symbol
with a leading space ("▁red") is never found. Here they are matched after spaces have become "▁", as SentencePiece does.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

_SPACE = "▁"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def tokenizer_json(
    model: sentencepiece.SentencePieceProcessor, bos_id: int | None, added: Mapping[str, bool]
) -> str | None:
    """Returns the content of tokenizer.json, or None for a model that it cannot express exactly.

    It can express BPE with byte fallback, no normalization and kept spaces, such as Llama's, unless the model has both
    user-defined symbols and a space inserted before every text. Exports of other models have tokenizer.model alone.

    bos_id: id that precedes every text, or None. added: tokens after those of the model, and whether each is special.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    exact = trainer.model_type == trainer.BPE and trainer.byte_fallback and not normalizer.precompiled_charsmap
    spaces = normalizer.escape_whitespaces and not normalizer.remove_extra_whitespaces
    if not exact or not spaces or trainer.treat_whitespace_as_suffix or _UNUSED in kinds:
        return None
    if normalizer.add_dummy_prefix and _USER_DEFINED in kinds:
        return None  # the tokenizers library would insert a space before and after each symbol
    pieces = [(piece.piece, piece.type, piece.score) for piece in proto.pieces]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normalizer.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                *(
                    # Symbols of the text are found after spaces have become "▁".
                    _added(i, piece, special := kind == _CONTROL or is_marker(piece), normalized=not special)
                    for i, (piece, kind, _) in enumerate(pieces)
                    if kind in (_CONTROL, _USER_DEFINED)
                ),
                *(
                    _added(len(pieces) + i, piece, special, normalized=False)
                    for i, (piece, special) in enumerate(added.items())
                ),
            ],
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": None if bos_id is None else _begin_with(model.id_to_piece(bos_id), bos_id),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": model.id_to_piece(model.unk_id()),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
                "merges": _merges(pieces),
            },
        },
        ensure_ascii=False,
    )


def is_marker(piece: str) -> bool:
    """Returns whether a user-defined symbol marks turns and is not part of the text."""
    return re.fullmatch(r"<\|.*\|>|<(start|end)_of_turn>", piece) is not None


def _added(i: int, piece: str, special: bool, normalized: bool) -> dict[str, Any]:
    return {
        "id": i,
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": special,
    }


def _begin_with(piece: str, i: int) -> dict[str, Any]:
    token = {"SpecialToken": {"id": piece, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }


def _merges(pieces: list[tuple[str, int, float]]) -> list[list[str]]:
    """Returns every split of a piece into two others, best piece first, which is the order of SentencePiece merges."""
    known = {piece for piece, kind, _ in pieces if kind == _NORMAL}
    ranked = sorted((p for p in pieces if p[1] == _NORMAL), key=lambda p: -p[2])
    return [
        [piece[:cut], piece[cut:]]
        for piece, _, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
