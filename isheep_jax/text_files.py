"""Reads the text and JSON files that people write: prompts, seeds, pairs, templates, the data of tasks.

Such files come from many editors and tools. A byte order mark and Windows line ends are taken as what they are; only a
line feed ends a line, since JSON text may hold U+2028 and other marks that `str.splitlines` splits at. What cannot be
taken is refused with the file and the line: half of a surrogate pair, which no tokenizer takes, a name that is there
twice, of which JSON keeps the last one silently, and numbers that are none (NaN).
"""

import collections
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from isheep_jax.errors import UserError, one_line, quoted

# Characters of a file that a message quotes.
_QUOTED = 60
# Of a whole number; Python refuses to read 4,300, and no field has a use for a hundred.
_DIGITS = 100


def read_text(path: epath.PathLike, setting: str) -> str:
    """Returns the text of a UTF-8 file without a byte order mark, its line ends as line feeds.

    setting: the name that the file has for the user, with which errors begin. Raises `UserError` for a file that is not
    there, cannot be read or is not UTF-8.
    """
    try:
        data = epath.Path(path).read_bytes()
    except Exception as error:
        # Each kind of bucket has errors of its own.
        if not isinstance(error, OSError) and "://" not in str(path):
            raise
        raise UserError(f"{setting}: cannot read {path}: {getattr(error, 'strerror', '') or one_line(error)}") from None
    return decoded(data, f"{setting}: {path}")


def decoded(data: bytes, where: str) -> str:
    """Returns the text of a file's bytes, as `read_text`. where: what errors begin with."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return text.replace("\r\n", "\n")


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text. Raises `ValueError`, one line, for one that is malformed or says two things."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}" if "\n" in text else f"character {error.pos + 1}"
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at {place}") from None
    try:
        # Only an escape can make half a surrogate pair of a text that was UTF-8.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no character") from None
    return value


def read_object(path: epath.PathLike, setting: str, like: str) -> dict[str, Any]:
    """Returns the object that a JSON file holds. like: how it should look, for errors. Raises `UserError`."""
    try:
        value = parse_json(read_text(path, setting))
    except ValueError as error:
        raise UserError(f"{setting}: {path}: {error}; it should be like {like}") from None
    if not isinstance(value, dict):
        raise UserError(f"{setting}: {path} should be like {like}")
    return value


def read_objects(path: epath.PathLike, setting: str, like: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the objects of a JSON Lines file, or of a file with one JSON array, each after where it stands.

    Empty lines are left out. Where an object stands is "FILE, line 3" or, in an array, "FILE, item 3".

    Args:
        path: The file.
        setting: The name that the file has for the user, with which errors begin.
        like: How an object should look, for errors.

    Raises:
        UserError: The file cannot be read, is empty, or something in it is no object; the message names the line.
    """
    return objects_of(read_text(path, setting), path, setting, like)


def objects_of(text: str, path: epath.PathLike, setting: str, like: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the objects in the text of a file, as `read_objects`."""
    found = []
    for where, value in _values(path, text, setting, like):
        if not isinstance(value, dict):
            raise UserError(f"{setting}: {where} should be an object like {like}")
        found.append((where, value))
    if not found:
        raise UserError(f"{setting}: {path} is empty; each line should be like {like}")
    return found


def texts(where: str, row: dict[str, Any], needed: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """Returns some fields of an object, stripped: those that must be there and hold text, then those that may be empty.

    An optional field that is missing or null is "". Raises `UserError` that begins with `where` and names the field.
    """
    values = []
    for name in (*needed, *optional):
        value = row.get(name)
        if value is None and name in optional:
            value = ""
        if not isinstance(value, str):
            what = "is missing" if value is None else f"should be text, not {json.dumps(value)[:_QUOTED]}"
            raise UserError(f"{where}: {name!r} {what}")
        if name in needed and not value.strip():
            raise UserError(f"{where}: {name!r} is empty")
        values.append(value.strip())
    return values


def _values(path: epath.PathLike, text: str, setting: str, like: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            values = parse_json(text)
        except ValueError as error:
            raise UserError(f"{setting}: {path}: {error}") from None
        yield from ((f"{path}, item {number}", value) for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{setting}: {where}: {error}; each line should be like {like}, or the whole file one array"
                ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, count = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {quoted(twice)!r} is there {'twice' if count == 2 else f'{count} times'}")
    return values


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_QUOTED]} is beyond the numbers that are computed with")
    return value


def _int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits is beyond those that are computed with")
    return int(text)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


_STRICT = {"object_pairs_hook": _object, "parse_constant": _no_number, "parse_float": _float, "parse_int": _int}
