"""The two tokenizer formats, tokenizer.json and tokenizer.model, read by the libraries that define them."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from sentencepiece.sentencepiece_pb2 import SentencePieceText

from isheep_jax.errors import UserError, one_line
from isheep_jax.text.json_files import read_text_file
from isheep_jax.text.sentencepiece_json import is_marker, tokenizer_json

# Characters that are quoted of an error of the tokenizers library, which may quote the file.
_QUOTED = 300
# Characters of a text, from and to.
Span = tuple[int, int]


class Backend(Protocol):
    """Encodes and decodes.

    `encode` reads names of special tokens in the text as those tokens, and adds none. `align` gives the same ids and
    the characters of the text that each of them stands for. `decode` writes the names only if `special` is set. `ids`
    are those of all tokens. `add` gives a new token the next id. Control tokens are special, or mark turns;
    `control_names` finds their names in a text. `align_plain` takes these as text like any other. `encode_many` encodes
    several texts, on all cores. Where `is_local` is true, what precedes a word's space changes no id from there on.
    """

    size: int
    control_ids: Mapping[int, str]
    control_names: re.Pattern
    prefix: list[int]  # ids that precede every text
    is_local: bool

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...
    def align(self, text: str) -> tuple[list[int], list[Span]]: ...
    def align_plain(self, text: str) -> tuple[list[int], list[Span]]: ...
    def decode(self, ids: list[int], special: bool = False) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def ids(self) -> Iterable[int]: ...
    def add(self, token: str, special: bool) -> None: ...


class FastBackend:
    """tokenizer.json, read by the tokenizers library that transformers' fast tokenizers wrap.

    rows: of the model's embeddings; added tokens beyond them are left out, so that their names are plain text.
    """

    def __init__(self, path: epath.Path, rows: int | None = None):
        self._path = path
        text = read_text_file(path)
        self._fast = _fast_tokenizer(text, path)
        self.size = self._count()
        if rows is not None and self.size > rows:
            self._fast = _fast_tokenizer(_without_added(text, rows), path)
            self.size = self._count()
        self.prefix = self._leading_ids()

    @functools.cached_property
    def control_ids(self) -> dict[int, str]:
        added = self._fast.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special or is_marker(token.content)}

    @functools.cached_property
    def control_names(self) -> re.Pattern:
        return _any_of(self.control_ids.values())

    @functools.cached_property
    def is_local(self) -> bool:
        model = self._fast.model
        return type(model).__name__ == "BPE" and not model.dropout and not _any_spans_words(self._fast.get_vocab())

    @functools.cached_property
    def _plain(self) -> Any:
        """The library's tokenizer without control tokens."""
        file = json.loads(self._fast.to_str())
        for token in file["added_tokens"]:
            token["special"] = token["id"] in self.control_ids
        plain = _fast_tokenizer(json.dumps(file), self._path)
        plain.encode_special_tokens = True
        return plain

    def _count(self) -> int:
        # Added tokens may leave gaps after the vocabulary.
        return max(self._fast.get_vocab_size(), *(i + 1 for i in self._fast.get_added_tokens_decoder()), 0)

    def _leading_ids(self) -> list[int]:
        with _errors_of(self._path):
            plain = self._fast.encode("a", add_special_tokens=False).ids
            whole = self._fast.encode("a", add_special_tokens=True).ids
        return whole[: max(0, _find(whole, plain))]

    def encode(self, text: str) -> list[int]:
        with _errors_of(self._path):
            return self._fast.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        with _errors_of(self._path):
            return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def align(self, text: str) -> tuple[list[int], list[Span]]:
        with _errors_of(self._path):
            return _aligned(self._fast, text)

    def align_plain(self, text: str) -> tuple[list[int], list[Span]]:
        with _errors_of(self._path):
            return _aligned(self._plain, text)

    def decode(self, ids: list[int], special: bool = False) -> str:
        with _errors_of(self._path):
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
        for name in ("control_ids", "control_names", "is_local", "_plain"):
            self.__dict__.pop(name, None)


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
        self.control_ids = {i: piece for i, piece in enumerate(pieces) if piece in self._outside or is_marker(piece)}
        self._added: dict[str, bool] = {}
        self._find_names()

    def _find_names(self) -> None:
        self._outside_names, self.control_names = _any_of(self._outside), _any_of(self.control_ids.values())

    @functools.cached_property
    def is_local(self) -> bool:
        trainer = sentencepiece_model_pb2.ModelProto.FromString(self.model.serialized_model_proto()).trainer_spec
        pieces = (self.model.id_to_piece(i) for i in range(len(self.model)))
        return trainer.model_type == trainer.BPE and not _any_spans_words((*pieces, *self._outside))

    @functools.cached_property
    def _plain(self) -> sentencepiece.SentencePieceProcessor:
        """The library's model with markers as control symbols, which it does not find in a text."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model.serialized_model_proto())
        for i in self.control_ids.keys() & range(len(self.model)):
            proto.pieces[i].type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text):
            ids.extend([self._outside[part]] if part in self._outside else self.model.encode(part))
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if any(map(self._outside_names.search, texts)):
            return [self.encode(text) for text in texts]
        return self.model.encode(list(texts))

    def align(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        begin = 0
        for part in self._parts(text):
            if part in self._outside:
                ids.append(self._outside[part])
                spans.append((begin, begin + len(part)))
            else:
                part_ids, part_spans = _aligned_pieces(self.model, part)
                ids.extend(part_ids)
                spans.extend((begin + first, begin + last) for first, last in part_spans)
            begin += len(part)
        return ids, spans

    def align_plain(self, text: str) -> tuple[list[int], list[Span]]:
        return _aligned_pieces(self._plain, text)

    def _parts(self, text: str) -> list[str]:
        """Returns the names of tokens outside the model in a text, and the texts between them."""
        parts, begin = [], 0
        for name in self._outside_names.finditer(text):
            parts += [text[begin : name.start()], name.group()]
            begin = name.end()
        return [part for part in (*parts, text[begin:]) if part]

    def decode(self, ids: list[int], special: bool = False) -> str:
        # The library drops control symbols and knows no added tokens, so the text between them is decoded separately.
        names = {i: piece for piece, i in self._outside.items() if special or i not in self.control_ids}
        text, part = "", []
        for i in ids:
            if i in names:
                text, part = text + self.model.decode(part) + names[i], []
            elif i < len(self.model) and (special or i not in self.control_ids):
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
        if special or is_marker(token):
            self.control_ids[self.size] = token
        self._find_names()
        self.size += 1

    def tokenizer_json(self, bos_id: int | None) -> str | None:
        """Returns a tokenizer.json that gives the same ids, or None if it cannot. bos_id: see `tokenizer_json`."""
        return tokenizer_json(self.model, bos_id, self._added)


def _any_of(names: Iterable[str]) -> re.Pattern:
    """Returns a pattern that finds any of the names, the longest where one begins another."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _any_spans_words(pieces: Iterable[str]) -> bool:
    """Returns whether any piece of a vocabulary goes on, after a character that can be seen, with a space.

    Vocabularies write a space as one of three characters.
    """
    pieces = list(pieces)
    # No byte-level vocabulary has the first one, and for the others the second one is a letter.
    space = "▁" if "▁" in pieces else "Ġ"
    return any(map(re.compile(f"[!-~][ {space}]").search, pieces))


def _aligned(fast: Any, text: str) -> tuple[list[int], list[Span]]:
    encoding = fast.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _aligned_pieces(model: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[Span]]:
    pieces = SentencePieceText.FromString(model.encode(text, out_type="serialized_proto")).pieces
    return [piece.id for piece in pieces], _characters(text, pieces)


class _errors_of:
    """Raises `UserError`, naming the file, for what the tokenizers library raises: bare Exception, or a panic."""

    def __init__(self, path: epath.Path, problem: str = "cannot tokenize a text"):
        self._path, self._problem = path, problem

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        # A panic of the library is no Exception.
        if kind is None or not (issubclass(kind, Exception) or kind.__name__ == "PanicException"):
            return
        import tokenizers

        raise UserError(
            f"{self._path} {self._problem}: {one_line(error)[:_QUOTED]} (a newer version of the tokenizers library "
            f"than {tokenizers.__version__} may read it)"
        ) from None


def _fast_tokenizer(text: str, path: epath.Path) -> Any:
    """Returns the library's tokenizer. Raises `UserError` for a text that it does not read. path: for the message."""
    import tokenizers

    with _errors_of(path, "is not a readable tokenizer"):
        fast = tokenizers.Tokenizer.from_str(text)
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
