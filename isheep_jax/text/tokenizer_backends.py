"""The two tokenizer formats, tokenizer.json and tokenizer.model, read by the libraries that define them."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

import sentencepiece
from etils import epath
from sentencepiece.sentencepiece_pb2 import SentencePieceText

from isheep_jax.errors import UserError, one_line
from isheep_jax.text.json_files import read_text_file
from isheep_jax.text.sentencepiece_json import is_marker, tokenizer_json

# Characters of a text, from and to.
Span = tuple[int, int]


class Backend(Protocol):
    """Encodes and decodes.

    `encode` reads names of special tokens in the text as those tokens, and adds none. `align` gives the same ids and
    the characters of the text that each of them stands for. `decode` writes the names only if `special` is set.
    """

    size: int
    prefix: list[int]  # ids that precede every text

    def encode(self, text: str) -> list[int]: ...
    def align(self, text: str) -> tuple[list[int], list[Span]]: ...
    def decode(self, ids: list[int], special: bool = False) -> str: ...
    def token_id(self, token: str) -> int | None: ...


class FastBackend:
    """tokenizer.json, read by the tokenizers library that transformers' fast tokenizers wrap."""

    def __init__(self, path: epath.Path):
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_str(read_text_file(path))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a readable tokenizer: {one_line(error)}") from None
        # A file may turn these on, but transformers uses them only when its caller asks for them.
        self._fast.no_truncation()
        self._fast.no_padding()
        # Added tokens may leave gaps after the vocabulary.
        self.size = max(self._fast.get_vocab_size(), *(i + 1 for i in self._fast.get_added_tokens_decoder()), 0)
        self.prefix = self._leading_ids()

    def _leading_ids(self) -> list[int]:
        plain = self._fast.encode("a", add_special_tokens=False).ids
        whole = self._fast.encode("a", add_special_tokens=True).ids
        return whole[: max(0, _find(whole, plain))]

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def align(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], special: bool = False) -> str:
        return self._fast.decode(ids, skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)


class SentencePieceBackend:
    """tokenizer.model, read by the sentencepiece library: transformers' conversion of it may give other ids."""

    def __init__(self, path: epath.Path):
        data = path.read_bytes()
        if not data:  # the library accepts an empty file without an error
            raise UserError(f"{path} is not a readable SentencePiece model: it is empty")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError):  # the message only names the library's source files
            raise UserError(
                f"{path} is not a readable SentencePiece model: it is damaged, cut short ({len(data)} bytes are "
                "there) or of another kind"
            ) from None
        self.size = len(self.model)
        self.prefix = [self.model.bos_id()] if self.model.bos_id() >= 0 else []
        pieces = [self.model.id_to_piece(i) for i in range(self.size)]
        self._control = {piece: i for i, piece in enumerate(pieces) if self.model.is_control(i)}
        self._split = re.compile("(" + "|".join(map(re.escape, self._control)) + ")") if self._control else None
        self._special = {i for i, piece in enumerate(pieces) if piece in self._control or is_marker(piece)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text):
            ids.extend([self._control[part]] if part in self._control else self.model.encode(part))
        return ids

    def align(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        begin = 0
        for part in self._parts(text):
            if part in self._control:
                ids.append(self._control[part])
                spans.append((begin, begin + len(part)))
            else:
                pieces = SentencePieceText.FromString(self.model.encode(part, out_type="serialized_proto")).pieces
                ids.extend(piece.id for piece in pieces)
                spans.extend((begin + first, begin + last) for first, last in _characters(part, pieces))
            begin += len(part)
        return ids, spans

    def _parts(self, text: str) -> list[str]:
        """Returns the names of control symbols in a text, and the texts between them."""
        return [part for part in (self._split.split(text) if self._split else [text]) if part]

    def decode(self, ids: list[int], special: bool = False) -> str:
        if not special:
            return self.model.decode([i for i in ids if i not in self._special])
        # The library drops control symbols, so the text between them is decoded separately.
        controls = {i: piece for piece, i in self._control.items()}
        text, part = "", []
        for i in ids:
            if i in controls:
                text, part = text + self.model.decode(part) + controls[i], []
            else:
                part.append(i)
        return text + self.model.decode(part)

    def token_id(self, token: str) -> int | None:
        i = self.model.piece_to_id(token)
        return None if i == self.model.unk_id() and token != self.model.id_to_piece(i) else i

    def tokenizer_json(self, bos_id: int | None) -> str | None:
        """Returns a tokenizer.json that gives the same ids, or None if it cannot. bos_id: see `tokenizer_json`."""
        return tokenizer_json(self.model, bos_id)


def _characters(text: str, pieces: Sequence[Any]) -> list[Span]:
    """Returns the characters of a text that each piece stands for, by the bytes that SentencePiece names.

    A piece without any, such as the first byte of a character, gets those of the piece after it.
    """
    character = [i for i, letter in enumerate(text) for _ in letter.encode()] + [len(text)]
    spans, after = [], (len(text), len(text))
    for piece in reversed(pieces):
        if piece.begin < piece.end:
            after = character[piece.begin], character[piece.end]
        spans.append(after)
    return spans[::-1]


def _find(whole: list[int], part: list[int]) -> int:
    """Returns where `part` first occurs in `whole`, or -1."""
    return next((i for i in range(len(whole)) if whole[i : i + len(part)] == part), -1)
