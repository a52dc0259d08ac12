"""The reader of the files that people write: what it takes as it is meant, and what it refuses by its line."""

import pytest

from isheep_jax.errors import UserError
from isheep_jax.text_files import parse_json, read_object, read_objects, read_text, texts

LIKE = '{"a": "..."}'


def write(tmp_path, data):
    path = tmp_path / "file.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "1"}\n{"a": "2"}\n',
        '\ufeff{"a": "1"}\r\n\r\n{"a": "2"}',
        '[{"a": "1"}, {"a": "2"}]',
        '\ufeff  [{"a": "1"},\r\n {"a": "2"}]\n',
    ],
)
def test_lines_and_arrays_of_any_editor_are_read_alike(tmp_path, text):
    assert [value for _, value in read_objects(write(tmp_path, text), "x", LIKE)] == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, mark):
    escaped = mark if ord(mark) > 0x1F else f"\\u{ord(mark):04x}"
    path = write(tmp_path, f'{{"a": "one{escaped}two"}}\n')
    assert read_objects(path, "x", LIKE) == [(f"{path}, line 1", {"a": f"one{mark}two"})]


def test_an_emoji_that_is_escaped_as_two_halves_is_whole(tmp_path):
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: "),
        ('{"a": "1"} {"a": "2"}', "not JSON: Extra data at character 12"),
        ("3", "should be an object like"),
        ("null", "should be an object like"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
        ('{"a": "1", "a": "2"}', "the name 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the name 'b' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": 1e400}', "1e400 is beyond the numbers"),
    ],
)
def test_what_a_line_cannot_mean_is_refused_by_its_number(tmp_path, line, reason):
    path = write(tmp_path, f'{{"a": "1"}}\n\n{line}\n')
    with pytest.raises(UserError) as error:
        read_objects(path, "synthesize.seeds", LIKE)
    message = str(error.value)
    assert message.startswith(f"synthesize.seeds: {path}, line 3")
    assert reason in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (b"[]", "is empty"),
        (b"[1]", "item 1 should be an object"),
        (b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, data, reason):
    with pytest.raises(UserError, match=r"^--input: .*file.jsonl") as error:
        read_objects(write(tmp_path, data), "--input", LIKE)
    assert reason in str(error.value)


def test_a_file_that_is_not_there_or_a_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^x: cannot read .*none: No such file"):
        read_text(tmp_path / "none", "x")
    with pytest.raises(UserError, match=r"^x: cannot read .*: Is a directory"):
        read_object(tmp_path, "x", LIKE)


def test_one_object_is_read_and_nothing_else(tmp_path):
    assert read_object(write(tmp_path, '\ufeff{"a": 1}\r\n'), "x", LIKE) == {"a": 1}
    for text in ("[]", "{", '{"a": 1}{}'):
        with pytest.raises(UserError, match=r'^x: .*should be like \{"a": "..."\}'):
            read_object(write(tmp_path, text), "x", LIKE)


def test_fields_are_text_stripped_and_named_where_they_are_not():
    assert texts("w", {"a": " 1 ", "b": None}, ("a",), ("b", "c")) == ["1", "", ""]
    for row, reason in [
        ({}, "'a' is missing"),
        ({"a": None}, "'a' is missing"),
        ({"a": " "}, "'a' is empty"),
        ({"a": 5}, "'a' should be text, not 5"),
        ({"a": ["x"]}, """'a' should be text, not ["x"]"""),
        ({"a": "x", "b": 5}, "'b' should be text, not 5"),
    ]:
        with pytest.raises(UserError, match=r"^w: ") as error:
            texts("w", row, ("a",), ("b",))
        assert reason in str(error.value)
