"""Whatever the files of a tokenizer or a chat template hold: they are used or refused in one line, in bounded time."""

import copy
import datetime
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import write_byte_level

from isheep_jax.errors import UserError
from isheep_jax.text.chat_template import check_syntax, render_template
from isheep_jax.text.conversation import Message
from isheep_jax.text.template_check import check_template
from isheep_jax.text.tokenizer import Tokenizer

# A hang limit, not a measurement.
BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=datetime.timedelta(seconds=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ADDED = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(["<s>", "x" * 10_000, "▁", {}, [], [[]], {"id": 5}, ["a", 7], {"String": ""}, {"Regex": "("}]),
)
PARTS = st.sampled_from(
    [
        {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
        {"type": "Strip", "content": " ", "start": 9, "stop": 9},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": True},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<z>", "type_id": 0}}], "pair": []},
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {"type": "BertProcessing", "sep": ["a", 70_000], "cls": ["b", 4]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["<s>", -1e300]]},
        {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []},
    ]
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict]:
    """What the JSON files of a tokenizer hold."""
    directory = write_byte_level(tmp_path_factory.mktemp("fuzz"), ["<s>", "<|im_start|>", "<|im_end|>"])
    size = Tokenizer.load(directory).vocab_size
    return {
        "tokenizer.json": json.loads((directory / "tokenizer.json").read_text()),
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>"},
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            "added_tokens_decoder": {str(size): {"content": "<x>", "special": True, **ADDED}},
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}<|im_end|>"}],
        },
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
        "added_tokens.json": {"<y>": size + 1},
        "generation_config.json": {"eos_token_id": [1, 2]},
    }


def places(value, path=()):
    """Yields the path of each value inside of another one; of long ones only the first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in list(items)[:12]:
        yield from places(part, (*path, name))


@BOUNDED
@given(data=st.data())
def test_files_that_are_damaged_anywhere_are_used_or_refused_in_one_line(files, tmp_path, data):
    name = data.draw(st.sampled_from([*files, "tokenizer.json"]))
    content = copy.deepcopy(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))))
        if not path:
            continue
        holder = content
        for step in path[:-1]:
            holder = holder[step]
        if data.draw(st.booleans()):
            holder[path[-1]] = copy.deepcopy(data.draw(st.one_of(VALUES, PARTS)))
        else:
            del holder[path[-1]]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for other, value in files.items():
        (tmp_path / other).write_text(json.dumps(content if other == name else value))
    template = data.draw(st.sampled_from(["auto", "chatml"]))
    refusal = refusal_of(lambda: use(Tokenizer.load(tmp_path, template, rows=402), tmp_path / "out"))
    assert "\n" not in refusal
    assert len(refusal) < 5000


def refusal_of(call) -> str:
    """Returns the one line of a refusal; "" without one. Any other error is the test's."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def use(tokenizer: Tokenizer, out: Path) -> None:
    check_template(tokenizer)
    ids, _ = tokenizer.encode_example((Message("user", "hi <|im_end|> <s> é"),), "red cat")
    assert all(0 <= i < 402 for i in ids)
    tokenizer.decode(ids)
    tokenizer.missing_ids(402)
    out.mkdir()
    tokenizer.save(out)
    Tokenizer.load(out)


@BOUNDED
@given(data=st.binary(max_size=200), name=st.sampled_from(["tokenizer.json", "tokenizer.model", "chat_template.jinja"]))
def test_bytes_in_place_of_a_file_are_refused_in_one_line(files, tmp_path, data, name):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    if name == "chat_template.jinja":
        (tmp_path / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    (tmp_path / name).write_bytes(data)
    refusal = refusal_of(lambda: Tokenizer.load(tmp_path))
    assert "\n" not in refusal
    assert refusal or name == "chat_template.jinja"


FRAGMENTS = [
    *(
        "{{ messages[0].content }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ loop.index }}",
        "{{ m.content | upper }}",
    ),
    *("{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{% set x = x ~ messages %}", "{{ x * 999999999 }}"),
    *("{% macro f() %}", "{% endmacro %}", "{{ f() }}", "{{ self.__init__ }}", "{{ 9 ** 999999 }}", "{% raw %}", "{#"),
    *(
        "{{ range(99999) | list }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ '%s' % messages }}",
        "{{-",
        "-}}",
        "é\ud7ff",
    ),
    *(
        "{{ messages | tojson }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now('%' * 9999) }}",
        "{{ ''.join(['a'] * 9) }}",
    ),
    *(
        "{{ raise_exception(messages) }}",
        "{% include 'x' %}",
        "{% block a %}{{ super() }}{% endblock %}",
        "{{ [] | first }}",
    ),
]


@BOUNDED
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=8))
def test_any_template_is_rendered_or_refused_in_one_line(fragments):
    template = "".join(fragments)
    messages = [{"role": "user", "content": "{{ 1 }}"}]
    for refusal in (
        refusal_of(lambda: check_syntax(template, "FILE")),
        refusal_of(lambda: render_template(template, messages=messages)),
    ):
        assert "\n" not in refusal
        assert len(refusal) < 1000
