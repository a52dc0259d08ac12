"""The tokenizer of a model directory with its chat template; all stages and training encode with it."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from isheep_jax.errors import UserError, quoted
from isheep_jax.text.chat_template import (
    CHAT_TEMPLATES,
    check_syntax,
    named_template,
    render_template,
    without_thinking,
)
from isheep_jax.text.control_names import HiddenNames, align_after_text
from isheep_jax.text.conversation import Conversation, Message, Prompt, opened
from isheep_jax.text.eos import configured_eos_ids
from isheep_jax.text.json_files import has_file, read_file, read_json_object, read_text_file
from isheep_jax.text.prompt_end import PromptEnd
from isheep_jax.text.tokenizer_backends import Backend, FastBackend, SentencePieceBackend, Span

# Names of end-of-turn tokens in common vocabularies. They end a completion even where no file says so.
_END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
# Marks the end of an opened message: a private-use character that occurs in no conversation, and a space, which tells
# whether a template cuts white space there.
_OPEN_END = "\ue001 "
# Characters of a rendered text that an error shows.
_SHOWN = 1000
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class Tokenizer:
    """Encodes text and conversations as token ids, and decodes ids.

    vocab_size: number of ids that the tokenizer knows.
    bos_id: id of the beginning-of-text token that precedes every text, or None.
    eos_ids: all ids that end a completion: end of text and end of turn, by the tokenizer's own files, by common names
        and by the model's config.json and generation_config.json.
    pad_id: padding id; masked everywhere.
    """

    def __init__(self, directory: epath.Path, backend: Backend, config: dict[str, Any], rows: int | None):
        self.directory = directory
        self._backend = backend
        _add_tokens(directory, backend, config, rows)
        self._special = _special_tokens(directory, backend, config)
        self._template = _own_template(directory, config)
        self.vocab_size = backend.size
        self._prefix = list(backend.prefix)
        if isinstance(backend, SentencePieceBackend) and config.get("add_bos_token") is False:
            self._prefix = []
        self.bos_id = self._prefix[0] if self._prefix else None
        self.eos_ids = self._find_eos_ids()
        # Templates write these tokens by name, so that a token known only by its id needs its name as well.
        for name, known in (("bos_token", self._prefix), ("eos_token", self.eos_ids)):
            self._special[name] = self._special[name] or self._name(known)
        self.pad_id = self.eos_ids[0] if self.eos_ids else 0

    @classmethod
    def load(cls, directory: os.PathLike | str, chat_template: str = "auto", rows: int | None = None) -> "Tokenizer":
        """Reads tokenizer.json, or tokenizer.model if there is no tokenizer.json, of a directory or a GGUF file.

        tokenizer.json says which tokens precede a text; with tokenizer.model it is the beginning-of-text token unless
        add_bos_token in tokenizer_config.json is false. As in transformers 5, add_bos_token has no effect on
        tokenizer.json.

        chat_template: "auto" (the directory's own, if any) or a name of `CHAT_TEMPLATES`. rows: of the model's
        embeddings. An added token without one, such as the image token of a model of text, is left out: its name is
        plain text. None: every token has one.

        Raises `UserError`, naming the file, when the directory holds no tokenizer or a damaged one.
        """
        directory = epath.Path(directory)
        if has_file(directory / "tokenizer.json"):
            backend: Backend = FastBackend(directory / "tokenizer.json", rows)
        elif has_file(directory / "tokenizer.model"):
            backend = SentencePieceBackend(directory / "tokenizer.model")
        else:
            raise UserError(f"{directory} holds no tokenizer: neither tokenizer.json nor tokenizer.model is there")
        path = directory / "tokenizer_config.json"
        tokenizer = cls(directory, backend, read_json_object(path) if has_file(path) else {}, rows)
        return tokenizer if chat_template == "auto" else tokenizer.with_template(chat_template)

    def with_template(self, name: str) -> "Tokenizer":
        """Returns a copy of the tokenizer that uses one of `CHAT_TEMPLATES`."""
        other = copy.copy(self)
        other._template = named_template(name, has_bos=self.bos_id is not None)
        return other

    def _name(self, ids: Sequence[int]) -> str | None:
        """Returns the name of the first id, if there is an id and the name encodes to it."""
        text = self.spell(ids[:1]) if ids and ids[0] < self.vocab_size else ""
        return text if text and self._backend.token_id(text) == ids[0] else None

    def _find_eos_ids(self) -> tuple[int, ...]:
        tokens = [self._special["eos_token"], *_END_OF_TURN_TOKENS]
        ids = [self._backend.token_id(token) for token in tokens if token]
        return tuple(dict.fromkeys([i for i in ids if i is not None] + [*configured_eos_ids(self.directory)]))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> str:
        """Source of the chat template in use; "" without one."""
        return self._template or ""

    @property
    def control_ids(self) -> Mapping[int, str]:
        """Names of the tokens that are special or mark turns, by their ids."""
        return self._backend.control_ids

    @property
    def start_id(self) -> int | None:
        """Id of the token that a text without a prompt is scored after: the first of bos_token and eos_token."""
        names = filter(None, (self._special["bos_token"], self._special["eos_token"]))
        return next((self._backend.token_id(name) for name in names), None)

    def missing_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Returns the ranges (from, to) of ids below `rows` without a token: those rows only fill up the embeddings."""
        known = sorted({i for i in (*self._backend.ids(), *self.eos_ids) if i < rows})
        return tuple((end + 1, begin) for end, begin in zip([-1, *known], [*known, rows]) if end + 1 < begin)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Returns the ids of a text, after the beginning-of-text token that the model expects unless bos is False.

        Names of special tokens in the text are read as these tokens, as other tools do: for text that its author has
        put in the form of the model. Prompts and examples have none but those of the chat template.
        """
        return [*(self._prefix if bos else []), *self._backend.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids without special tokens."""
        return self._backend.decode([int(i) for i in ids])

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of ids including the names of special tokens."""
        return self._backend.decode([int(i) for i in ids], special=True)

    def special_id(self, text: str) -> int | None:
        """Returns the id of the special token with this name, which `decode` leaves out; None for any other text."""
        token = self._backend.token_id(text)
        special = token is not None and not self.decode([token]) and self.spell([token]) == text
        return token if special else None

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Returns the ids of plain text, or of a conversation up to where the assistant goes on, as `render`.

        Names of control tokens in the text or in messages are text.
        """
        hidden = self._hidden_names(prompt)
        return [*(self._prefix if isinstance(prompt, str) else ()), *hidden.encode(self._written(prompt, hidden))]

    def _hidden_names(self, prompt: Prompt, *texts: str) -> HiddenNames:
        said = (prompt,) if isinstance(prompt, str) else (message.content for message in prompt)
        return HiddenNames(self._backend, (*said, *texts))

    def _written(self, prompt: Prompt, hidden: HiddenNames, response: str | None = None) -> str:
        """Returns plain text, or a conversation as `render`, with the names of control tokens hidden."""
        if isinstance(prompt, str):
            return hidden.hide(prompt)
        turns = tuple(Message(message.role, hidden.hide(message.content)) for message in prompt)
        return self.render(turns, None if response is None else hidden.hide(response))

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int] | UserError]:
        """Returns for each prompt what `encode_prompt` returns or raises; on all cores."""
        written = [self._written_plainly(prompt) for prompt in prompts]
        texts = {i: text for i, text in enumerate(written) if isinstance(text, str)}
        try:
            found = dict(zip(texts, self._backend.encode_many(list(texts.values()))))
        except UserError:  # of one of them
            found = {}
        return [self._encoded(prompts[i], found.get(i, text)) for i, text in enumerate(written)]

    def _written_plainly(self, prompt: Prompt) -> str | UserError | None:
        """Returns the text of a prompt, or why there is none; None where it has names of control tokens to hide."""
        try:
            hidden = self._hidden_names(prompt)
            return None if hidden else self._written(prompt, hidden)
        except UserError as error:
            return error

    def _encoded(self, prompt: Prompt, found: list[int] | str | UserError | None) -> list[int] | UserError:
        """Returns the ids of a prompt. found: those of its text or, where these are not known, anything else."""
        if isinstance(found, UserError):
            return found
        if isinstance(found, list):
            return [*(self._prefix if isinstance(prompt, str) else ()), *found]
        try:
            return self.encode_prompt(prompt)
        except UserError as error:
            return error

    def encode_choices(
        self, prompt: Prompt, choices: Sequence[str], ids: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Returns for each choice the ids that follow the prompt's when both are tokenized together.

        ids: those of the prompt, where they are known. Raises `UserError` when a choice changes how the prompt's end is
        tokenized.
        """
        return [found for found, _ in self._align_after(prompt, choices, ids)]

    def align_continuation(
        self, prompt: Prompt, text: str, ids: Sequence[int] | None = None
    ) -> tuple[list[int], list[Span], int | None]:
        """Returns the ids of a text after a prompt, the characters that each stands for, and the id that ends it.

        After a conversation the text is the response as the template writes it, and the end is that of the turn. White
        space that the template writes stands for no character. ids: those of the prompt, where they are known. Raises
        `UserError` where `encode_choices` or `encode_example` does.
        """
        if isinstance(prompt, str):
            ((found, spans),) = self._align_after(prompt, (text,), ids)
            return found, spans, next(iter(self.eos_ids), None)
        _, found, spans = self._align_response(prompt, text, ids)
        return found[:-1], spans[: len(found) - 1], found[-1]

    def _align_after(
        self, prompt: Prompt, texts: Sequence[str], ids: Sequence[int] | None
    ) -> list[tuple[list[int], list[Span]]]:
        hidden = self._hidden_names(prompt, *texts)
        marked = self._written(prompt, hidden)
        own = None if ids is None else ids[len(self._prefix) if isinstance(prompt, str) else 0 :]
        before, end, aligned = hidden.restore(marked), PromptEnd(hidden, marked, own), []
        for text in texts:
            following = end.align(hidden.hide(text))
            if following is None:
                raise UserError(
                    f"the choice {quoted(repr(text), _SHOWN)} changes the tokens of the prompt that ends in "
                    f"{before[-20:]!r}: end the prompt where a token ends, such as before a space"
                )
            found, spans = following
            aligned.append((found, _within(spans, len(before), text)))
        return aligned

    def encode_example(self, conversation: Conversation, response: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a conversation with its response and end of turn, and the loss mask: 1 on those two.

        Raises `UserError` when the template changes the conversation's text once the response is appended.
        """
        start, ids, _ = self._align_response(conversation, response, None)
        return [*start, *ids], [0] * len(start) + [1] * len(ids)

    def _align_response(
        self, conversation: Conversation, response: str, known: Sequence[int] | None
    ) -> tuple[list[int], list[int], list[Span]]:
        """Returns the ids of a conversation, those of the response with its end of turn, and the response's characters.

        The end of turn may have no characters in that last list. known: ids of the conversation, or None.
        """
        hidden = self._hidden_names(conversation, response)
        prompt = self._written(conversation, hidden)
        whole = self._written(conversation, hidden, response)
        if not whole.startswith(prompt):
            raise UserError(
                "the chat template is not stable when the answer is appended, so a model trained with it would not see "
                f"the prompt that it answers; it renders {quoted(repr(prompt), _SHOWN)} and then "
                f"{quoted(repr(whole), _SHOWN)}"
            )
        start = PromptEnd(hidden, prompt, known)
        first, following = len(hidden.restore(prompt)), start.align(whole[len(prompt) :])
        if following is None:
            # The first letters of the response merge with the last ones of the prompt, but decoding keeps the prompt.
            ids, spans = align_after_text(hidden.align, whole[len(prompt) :])
            spans = [(begin + first, end + first) for begin, end in spans]
        else:
            ids, spans = following
        # A completion ends at the first eos token, whatever a template writes after it.
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), None)
        ids = ids[: end + 1] if end is not None else [*ids, *self.eos_ids[:1]]
        begin = max(hidden.restore(whole).find(response.strip(), first), first)
        return start.ids, ids, _within(spans, begin - (len(response) - len(response.lstrip())), response)

    def render(self, conversation: Conversation, response: str | None = None) -> str:
        """Renders a conversation up to where the assistant goes on, or with a response and the end of its turn.

        The assistant goes on after the header of its turn or, in a conversation that ends with an assistant's message,
        after what that message says so far; a response then continues that message.
        """
        if self._template is None:
            raise UserError(
                f"{self.directory} has no chat template; set model.chat_template to one of: "
                + ", ".join(sorted(CHAT_TEMPLATES))
            )
        *turns, begun = conversation if opened(conversation) else (*conversation, Message("assistant", ""))
        if response is not None:
            return self._render([*turns, Message("assistant", begun.content + response)])
        if not opened(conversation):
            return self._render(turns, add_generation_prompt=True)
        text, _, after = self._render([*turns, Message("assistant", begun.content + _OPEN_END)]).rpartition(
            _OPEN_END[0]
        )
        return text if after.startswith(_OPEN_END[1:]) else text.rstrip()

    def _render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return render_template(
            self._template,
            messages=[{"role": turn.role, "content": turn.content} for turn in turns],
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special["bos_token"] or "",
            eos_token=self._special["eos_token"] or "",
        )

    def save(self, directory: os.PathLike | str) -> None:
        """Writes the tokenizer files and the chat template in use, for this library and for transformers."""
        directory = epath.Path(directory)
        for name in _FILES:
            if has_file(self.directory / name):
                (directory / name).write_bytes(read_file(self.directory / name))
        path = directory / "tokenizer_config.json"
        config = read_json_object(path) if path.exists() else {}
        text = self._converted()
        if text is not None:
            (directory / "tokenizer.json").write_text(text)
        if text is not None or isinstance(self._backend, FastBackend):
            # Any other class would replace the steps of the file by its own.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        else:
            config["add_bos_token"] = self.bos_id is not None
        if "add_bos_token" in config:
            config["add_bos_token"] = self.bos_id is not None
        config |= {name: token for name, token in self._special.items() if token}
        config.pop("chat_template", None)
        if self._template is not None:
            # Some servers and converters read the template from one of the two places only.
            config["chat_template"] = without_thinking(self._template)
            (directory / "chat_template.jinja").write_text(config["chat_template"])
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    @property
    def export_note(self) -> str | None:
        """One line for the user of an export whose tokenizer needs a special library, or None."""
        if isinstance(self._backend, FastBackend) or self._converted() is not None:
            return None
        return (
            "The tokenizer is a SentencePiece model that tokenizer.json cannot express. Load tokenizer.model with the "
            "sentencepiece library: transformers' AutoTokenizer converts it by itself and may give other ids."
        )

    def _converted(self) -> str | None:
        """Returns tokenizer.model in the format of tokenizer.json, or None if that cannot express it."""
        return self._backend.tokenizer_json(self.bos_id) if isinstance(self._backend, SentencePieceBackend) else None


def _within(spans: Sequence[Span], begin: int, text: str) -> list[Span]:
    """Returns spans of a longer text as spans of the one that begins there; what is outside of it is cut off."""
    return [tuple(min(max(end - begin, 0), len(text)) for end in span) for span in spans]


def _special_tokens(directory: epath.Path, backend: Backend, config: dict[str, Any]) -> dict[str, str | None]:
    """Returns the names of bos_token and eos_token, or None.

    Raises `UserError` for a token that is not in the vocabulary: transformers would give it a new id, for which the
    model has no embedding.
    """
    path = directory / "tokenizer_config.json"
    old = directory / "special_tokens_map.json"
    sources = [(path, config), *([(old, read_json_object(old))] if has_file(old) else [])]
    tokens: dict[str, str | None] = {}
    for name in ("bos_token", "eos_token"):
        for source, values in sources:
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not isinstance(token, str) or backend.token_id(token) is None:
                raise UserError(
                    f"{source}: {name} is {quoted(repr(token))}, which is not in the tokenizer's vocabulary"
                )
            tokens[name] = token
            break
        else:
            i = getattr(backend.model, name[:3] + "_id")() if isinstance(backend, SentencePieceBackend) else -1
            tokens[name] = backend.model.id_to_piece(i) if i >= 0 else None
    return tokens


def _add_tokens(directory: epath.Path, backend: Backend, config: dict[str, Any], rows: int | None) -> None:
    """Gives the tokenizer the tokens that only the files next to it name, as transformers does.

    Raises `UserError` for a token whose id is not the next one or another one's: the model would read a wrong row.
    """
    path, old = directory / "tokenizer_config.json", directory / "added_tokens.json"
    sources = {path: _added_tokens(path, config)}
    if has_file(old):
        sources[old] = {token: (i, True) for token, i in read_json_object(old).items()}
    for source, added in sources.items():
        for token, (i, special) in sorted(added.items(), key=lambda item: item[1][0] if _is_id(item[1][0]) else -1):
            if _is_id(i) and rows is not None and i >= rows:
                continue
            known = backend.token_id(token)
            if known is None and i == backend.size and token:
                backend.add(token, special)
            elif known != i:
                has = "is not there" if known is None else f"has the id {known}"
                raise UserError(
                    f"{source}: token {quoted(repr(token))} has the id {quoted(i)}, but in the tokenizer's vocabulary "
                    f"it {has}; save the tokenizer anew with transformers, so that tokenizer.json holds every token"
                )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _added_tokens(path: epath.Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Returns the id of each token of added_tokens_decoder, and whether it is special."""
    added = config.get("added_tokens_decoder", {})
    try:
        return {token["content"] + "": (int(i), bool(token.get("special"))) for i, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: added_tokens_decoder is not an object from ids to tokens") from None


def _own_template(directory: epath.Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if has_file(path):
        template, source = read_text_file(path), f"{path}"
    else:
        template, source = config.get("chat_template"), f"{directory / 'tokenizer_config.json'}: chat_template"
    if isinstance(template, list):  # several named templates
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1] if named else None
    if template is not None and not isinstance(template, str):
        raise UserError(f"{source} is neither a string nor a list of named templates")
    if template is not None:
        check_syntax(template, source)
    return template
