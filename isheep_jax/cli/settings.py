"""What a command line may set: the fields of a dataclass as named settings, with their types, texts and values."""

import ast
import dataclasses
import functools
import inspect
import json
import operator
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# Metadata of a field that holds a dataclass whose settings are written --name, not --field.name.
WITHOUT_PREFIX = {"without_prefix": True}


@dataclass(frozen=True)
class Setting:
    """One setting of a command line.

    name: as on the command line ("sft.learning_rate"). path: the fields that lead to it ("settings.sft.learning_rate").
    hint: its type. text: its docstring, on one line.
    """

    name: str
    path: str
    hint: Any
    text: str

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    def value_of(self, options: Any) -> Any:
        """Returns the setting's value in an instance of the dataclass."""
        return operator.attrgetter(self.path)(options)

    def parse(self, words: list[str]) -> Any:
        """Returns the value that the words mean. Raises `ValueError` when they have the wrong type."""
        if self.is_list:
            return tuple(_parse(typing.get_args(self.hint)[0], word) for word in words)
        return _parse(self.hint, words[0] if words else "true")

    def describe(self) -> str:
        """Says what the value must be, for an error message."""
        if self.is_list:
            return f"a list (with commas) whose items are each {_describe(typing.get_args(self.hint)[0])}"
        return _describe(self.hint)

    @property
    def values(self) -> str:
        """Stands for the value in `--help`: INT, FLOAT, STRING, the choices, or a list of these."""
        if self.is_list:
            item = _values(typing.get_args(self.hint)[0])
            return f"{{{item}}},..." if "|" in item else f"{item},..."
        return _values(self.hint)

    def example(self, value: Any) -> str:
        """Returns a good value as it is written: `value`, or the first choice where that is empty."""
        hint = typing.get_args(self.hint)[0] if self.is_list else self.hint
        return written(value) or next(iter(_choices(hint)), "")


def settings_of(options: type) -> dict[str, Setting]:
    """Returns every setting of the dataclass by its name, in the order of the fields."""
    return {setting.name: setting for setting in _walk(options, "", "")}


def sections_of(options: type, prefix: str = "") -> dict[str, str]:
    """Returns the docstrings of the dataclasses that are fields of `options` and its fields, by their prefix."""
    sections: dict[str, str] = {}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = prefix if field.metadata.get("without_prefix") else f"{prefix}{field.name}."
            if inner != prefix:
                sections[inner] = _one_line(hints[field.name].__doc__)
            sections |= sections_of(hints[field.name], inner)
    return sections


def written(value: Any) -> str:
    """Returns the value as it is written on a command line."""
    if isinstance(value, tuple):
        items = list(map(written, value))
        return json.dumps(items, ensure_ascii=False) if any("," in item for item in items) else ",".join(items)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _walk(options: type, prefix: str, path: str) -> Iterator[Setting]:
    hints, texts = typing.get_type_hints(options), _texts(options)
    for field in dataclasses.fields(options):
        hint, name = hints[field.name], field.name
        if dataclasses.is_dataclass(hint):
            inner = prefix if field.metadata.get("without_prefix") else f"{prefix}{name}."
            yield from _walk(hint, inner, f"{path}{name}.")
        else:
            yield Setting(prefix + name, path + name, hint, texts.get(name, ""))


@functools.cache
def _texts(options: type) -> dict[str, str]:
    """Returns the docstring of each field of a dataclass: the string after it in the source."""
    texts: dict[str, str] = {}
    for ancestor in reversed(options.__mro__):
        if not dataclasses.is_dataclass(ancestor):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        for field, after in zip(definition.body, definition.body[1:]):
            is_string = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_string:
                texts[field.target.id] = _one_line(after.value.value)
    return texts


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _choices(hint: Any) -> list[str]:
    """Returns what a `Literal` may be; "", which stands for a missing option, is left out."""
    return (
        [str(choice) for choice in typing.get_args(hint) if choice != ""] if typing.get_origin(hint) is Literal else []
    )


def _parse(hint: Any, word: str) -> Any:
    if typing.get_origin(hint) is Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}[word]
    if hint is bool:
        return {"true": True, "false": False}[word.lower()]
    return hint(word)


def _describe(hint: Any) -> str:
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a string")


def _values(hint: Any) -> str:
    if choices := _choices(hint):
        return "|".join(choices)
    return {int: "INT", float: "FLOAT", bool: "true|false"}.get(hint, "STRING")
