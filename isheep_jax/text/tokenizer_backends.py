"""The two tokenizer formats, tokenizer.json and tokenizer.model, read by the libraries that define them."""

import json
import re
from collections.abc import Iterable, Sequence
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
    the characters of the text that each of them stands for. `decode` writes the names only if `special` is set. `ids`
    are those of all tokens. `add` gives a new token the next id.
    """

    size: int
    prefix: list[int]  # ids that precede every text

    def encode(self, text: str) -> list[int]: ...
    def align(self, text: str) -> tuple[list[int], list[Span]]: ...
    def decode(self, ids: list[int], special: bool = False) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def ids(self) -> Iterable[int]: ...
    def add(self, token: str, special: bool) -> None: ...


class FastBackend:
    """tokenizer.json, read by the tokenizers library that transformers' fast tokenizers wrap.

    rows: of the model's embeddings; added tokens beyond them are left out, so that their names are plain text.
    """

    def __init__(self, path: epath.Path, rows: int | None = None):
        text = read_text_file(path)
        self._fast = _fast_tokenizer(text, path)
        self.size = self._count()
        if rows is not None and self.size > rows:
            self._fast = _fast_tokenizer(_without_added(text, rows), path)
            self.size = self._count()
        self.prefix = self._leading_ids()

    def _count(self) -> int:
        # Added tokens may leave gaps after the vocabulary.
        return max(self._fast.get_vocab_size(), *(i + 1 for i in self._fast.get_added_tokens_decoder()), 0)

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

    def ids(self) -> Iterable[int]:
        if self._fast.get_vocab_size() == self.size:  # no gap, and a dictionary of a large vocabulary takes a second
            return range(self.size)
        return self._fast.get_vocab().values()

    def add(self, token: str, special: bool) -> None:
        from tokenizers import AddedToken

        self._fast.add_tokens([AddedToken(token, special=special, normalized=False)])
        self.size = self._count()


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
        # Tokens that the model does not find in a text: control symbols, and those of other files.
        self._outside = {piece: i for i, piece in enumerate(pieces) if self.model.is_control(i)}
        self._special = {i for i, piece in enumerate(pieces) if piece in self._outside or is_marker(piece)}
        self._added: dict[str, bool] = {}
        self._split = _splitter(self._outside)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text):
            ids.extend([self._outside[part]] if part in self._outside else self.model.encode(part))
        return ids

    def align(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        begin = 0
        for part in self._parts(text):
            if part in self._outside:
                ids.append(self._outside[part])
                spans.append((begin, begin + len(part)))
            else:
                pieces = SentencePieceText.FromString(self.model.encode(part, out_type="serialized_proto")).pieces
                ids.extend(piece.id for piece in pieces)
                spans.extend((begin + first, begin + last) for first, last in _characters(part, pieces))
            begin += len(part)
        return ids, spans

    def _parts(self, text: str) -> list[str]:
        """Returns the names of tokens outside the model in a text, and the texts between them."""
        return [part for part in (self._split.split(text) if self._split else [text]) if part]

    def decode(self, ids: list[int], special: bool = False) -> str:
        # The library drops control symbols and knows no added tokens, so the text between them is decoded separately.
        names = {i: piece for piece, i in self._outside.items() if special or i not in self._special}
        text, part = "", []
        for i in ids:
            if i in names:
                text, part = text + self.model.decode(part) + names[i], []
            elif i < len(self.model) and (special or i not in self._special):
                part.append(i)
        return text + self.model.decode(part)

    def token_id(self, token: str) -> int | None:
        if token in self._outside:
            return self._outside[token]
        i = self.model.piece_to_id(token)
        return None if i == self.model.unk_id() and token != self.model.id_to_piece(i) else i

    def ids(self) -> Iterable[int]:
        return range(self.size)

    def add(self, token: str, special: bool) -> None:
        self._outside[token] = self.size
        self._added[token] = special
        self._split = _splitter(self._outside)
        if special:
            self._special.add(self.size)
        self.size += 1

    def tokenizer_json(self, bos_id: int | None) -> str | None:
        """Returns a tokenizer.json that gives the same ids, or None if it cannot. bos_id: see `tokenizer_json`."""
        return tokenizer_json(self.model, bos_id, self._added)


def _splitter(names: Iterable[str]) -> re.Pattern | None:
    """Returns a pattern that splits a text at any of the names and keeps them; None without names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _fast_tokenizer(text: str, path: epath.Path) -> Any:
    """Returns the library's tokenizer. Raises `UserError` for a text that it does not read. path: for the message."""
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, or PanicException, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UserError(
            f"{path} is not a readable tokenizer: {one_line(error)} (a newer version of the tokenizers library than "
            f"{tokenizers.__version__} may read it)"
        ) from None
    # A file may turn these on, but transformers uses them only when its caller asks for them.
    fast.no_truncation()
    fast.no_padding()
    return fast


def _without_added(text: str, rows: int) -> str:
    """Returns a tokenizer.json without the added tokens whose ids are `rows` or more."""
    file = json.loads(text)
    outside = {token["content"] for token in file["added_tokens"] if token["id"] >= rows}
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in outside]
    vocabulary = file["model"]["vocab"]
    if isinstance(vocabulary, dict):
        file["model"]["vocab"] = {piece: i for piece, i in vocabulary.items() if piece not in outside}
    return json.dumps(file)


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
