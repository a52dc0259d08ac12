"""Tokenizer and chat template of a model directory: one renderer for synthesis, judging, training and evaluation."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from isheep_jax.errors import UserError
from isheep_jax.model.chat_template import CHAT_TEMPLATES, render_template
from isheep_jax.model.conversation import Conversation, Message, Prompt

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class _Backend(Protocol):
    """Text to ids and back. `encode` takes special tokens written in the text as those tokens, and adds none."""

    size: int
    prefix: list[int]  # what the tokenizer puts before a text of its own accord

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_id(self, token: str) -> int | None: ...


class _Fast:
    """tokenizer.json, by the tokenizers library that transformers' fast tokenizers wrap."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a readable tokenizer: {error}") from None
        self.size = self._fast.get_vocab_size()
        self.prefix = self._leading_ids()

    def _leading_ids(self) -> list[int]:
        plain = self._fast.encode("a", add_special_tokens=False).ids
        whole = self._fast.encode("a", add_special_tokens=True).ids
        return whole[: max(0, _find(whole, plain))]

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)


class _SentencePiece:
    """tokenizer.model, by the sentencepiece library itself: transformers' conversion of it may give other ids."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a readable SentencePiece model: {error}") from None
        self.size = len(self.model)
        self.prefix = [self.model.bos_id()] if self.model.bos_id() >= 0 else []
        controls = [self.model.id_to_piece(i) for i in range(self.size) if self.model.is_control(i)]
        self._control = re.compile("(" + "|".join(map(re.escape, controls)) + ")") if controls else None
        pieces = map(self.model.id_to_piece, range(self.size))
        self._skipped = {
            i for i, piece in enumerate(pieces) if self.model.is_control(i) or re.fullmatch(r"<\|.*\|>", piece)
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._control.split(text) if self._control else [text]:
            if self._control and self._control.fullmatch(part):
                ids.append(self.model.piece_to_id(part))
            elif part:
                ids.extend(self.model.encode(part))
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i not in self._skipped])

    def token_id(self, token: str) -> int | None:
        i = self.model.piece_to_id(token)
        return None if i == self.model.unk_id() else i


def _find(whole: list[int], part: list[int]) -> int:
    return next((i for i in range(len(whole)) if whole[i : i + len(part)] == part), -1)


class Tokenizer:
    """Text and conversations to token ids and back.

    vocab_size: ids that the tokenizer knows. bos_id: put before every text, or None. eos_ids: end of text and end of
    turn; each of them ends a completion. pad_id: an id for places that nothing looks at.
    """

    def __init__(self, directory: Path, backend: _Backend, template: str | None, config: dict[str, Any]):
        self._directory = directory
        self._backend = backend
        self._template = template
        self._special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token")}
        if isinstance(backend, _SentencePiece):
            for name, i in (("bos_token", backend.model.bos_id()), ("eos_token", backend.model.eos_id())):
                self._special[name] = self._special[name] or (backend.model.id_to_piece(i) if i >= 0 else None)
        self.vocab_size = backend.size
        self._prefix = self._leading_ids(config.get("add_bos_token"))
        self.bos_id = self._prefix[0] if self._prefix else None
        self.eos_ids = self._end_ids()
        self.pad_id = self.eos_ids[0] if self.eos_ids else 0

    @classmethod
    def load(cls, directory: Path, chat_template: str = "auto") -> "Tokenizer":
        """Reads tokenizer.json, or tokenizer.model where there is no tokenizer.json.

        chat_template: "auto" (the directory's own, if any) or a name of `CHAT_TEMPLATES`. Raises `UserError` when the
        directory holds no tokenizer.
        """
        directory = Path(directory)
        if (directory / "tokenizer.json").exists():
            backend: _Backend = _Fast(directory / "tokenizer.json")
        elif (directory / "tokenizer.model").exists():
            backend = _SentencePiece(directory / "tokenizer.model")
        else:
            raise UserError(f"{directory} holds no tokenizer: neither tokenizer.json nor tokenizer.model is there")
        path = directory / "tokenizer_config.json"
        config = _read_json(path) if path.exists() else {}
        template = _own_template(directory, config) if chat_template == "auto" else CHAT_TEMPLATES[chat_template]
        return cls(directory, backend, template, config)

    def _leading_ids(self, add_bos: bool | None) -> list[int]:
        """What stands before every text: the tokenizer's own choice, unless tokenizer_config.json says otherwise."""
        if add_bos is False:
            return []
        begin = self._backend.token_id(self._special["bos_token"]) if add_bos and self._special["bos_token"] else None
        return list(self._backend.prefix) or ([] if begin is None else [begin])

    def _end_ids(self) -> tuple[int, ...]:
        tokens = [self._special["eos_token"], *_END_OF_TURN]
        ids = [self._backend.token_id(t) for t in tokens if t]
        path = self._directory / "generation_config.json"
        if path.exists():
            value = _read_json(path).get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, with the beginning-of-text token that the model expects unless bos is False."""
        return [*(self._prefix if bos else []), *self._backend.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids])

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of bare text, or of a conversation up to the header of the assistant's turn."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        return self._backend.encode(self.render(prompt))

    def encode_choice(self, prompt: Prompt, choice: str) -> list[int]:
        """The ids that follow the prompt's own when prompt and choice are tokenized together.

        Raises `UserError` when the choice changes how the prompt's end is tokenized.
        """
        start = self.encode_prompt(prompt)
        text = prompt if isinstance(prompt, str) else self.render(prompt)
        whole = self.encode(text + choice) if isinstance(prompt, str) else self._backend.encode(text + choice)
        if whole[: len(start)] != start:
            raise UserError(
                f"the choice {choice!r} changes the tokens of the prompt that ends in {text[-20:]!r}: "
                "end the prompt where a token ends, such as before a space"
            )
        return whole[len(start) :]

    def encode_example(self, conversation: Conversation, response: str) -> tuple[list[int], list[int]]:
        """Ids of the conversation with its response and end of turn, and a mask that is 1 on the latter two.

        Raises `UserError` when the template changes the conversation's text once the response is appended.
        """
        prompt, whole = self.render(conversation), self.render(conversation, response)
        if not whole.startswith(prompt):
            raise UserError(
                "the chat template is not stable when the answer is appended, so a model trained with it would not see "
                f"the prompt that it answers; it renders {prompt!r} and then {whole!r}"
            )
        start, ids = self._backend.encode(prompt), self._backend.encode(whole)
        if ids[: len(start)] != start:
            # The response's first letters merge with the prompt's last. While decoding the prompt's tokens are fixed.
            ids = start + self._backend.encode(whole[len(prompt) :])
        end = max((i for i in range(len(start), len(ids)) if ids[i] in self.eos_ids), default=None)
        ids = ids[: end + 1] if end is not None else [*ids, *self.eos_ids[:1]]
        return ids, [0] * len(start) + [1] * (len(ids) - len(start))

    def render(self, conversation: Conversation, response: str | None = None) -> str:
        """The conversation as text: up to the assistant's header, or with a response and what ends its turn."""
        if self._template is None:
            raise UserError(
                f"{self._directory} has no chat template; set model.chat_template to one of: "
                + ", ".join(sorted(CHAT_TEMPLATES))
            )
        turns = conversation if response is None else (*conversation, Message("assistant", response))
        return render_template(
            self._template,
            messages=[{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=response is None,
            bos_token=self._special["bos_token"] or "",
            eos_token=self._special["eos_token"] or "",
        )

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files and the chat template in use, for this library and for transformers."""
        directory = Path(directory)
        for name in _FILES:
            if (self._directory / name).exists():
                shutil.copyfile(self._directory / name, directory / name)
        path = directory / "tokenizer_config.json"
        config = _read_json(path) if path.exists() else {}
        config.pop("chat_template", None)
        if isinstance(self._backend, _SentencePiece):
            from isheep_jax.model.sentencepiece_json import tokenizer_json

            if (text := tokenizer_json(self._backend.model, self.bos_id)) is not None:
                (directory / "tokenizer.json").write_text(text)
                # Any other class would put its own steps in the place of the file's.
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
        else:
            config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config |= {name: token for name, token in self._special.items() if token}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if self._template is not None:
            (directory / "chat_template.jinja").write_text(self._template)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _own_template(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value
