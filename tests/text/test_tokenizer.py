import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from memory_bucket import memory_bucket
from small_tokenizers import random_texts, trained_model, write_byte_level

from isheep_jax.errors import UserError
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }}<|end|>"
    "{% else %}<|user|> {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = (Message("user", "Copy red cat."),)


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory) -> Path:
    """A directory with only tokenizer.model and a chat template."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "tokenizer.model").write_bytes(trained_model())
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def tokenizer(sentencepiece_directory) -> Tokenizer:
    return Tokenizer.load(sentencepiece_directory)


@pytest.fixture(scope="module")
def export(tokenizer, tmp_path_factory) -> Path:
    """Adds a config.json, as checkpoints have; transformers would choose the tokenizer class by it."""
    directory = tmp_path_factory.mktemp("export")
    tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return directory


def test_ids_are_sentencepieces_own(tokenizer, sentencepiece_directory):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (len(model), 1)
    assert set(tokenizer.eos_ids) == {2, model.piece_to_id("<|end|>")}
    for text in random_texts():
        if "<s>" not in text:  # control symbols are taken as such here, as transformers does
            assert tokenizer.encode(text) == [1, *model.encode(text)], text
            assert tokenizer.encode(text, bos=False) == model.encode(text)
    assert model.id_to_piece(tokenizer.encode("a red cat", bos=False)[-2:]) == ["▁red", "▁cat"]


def test_text_comes_back_without_special_tokens(tokenizer):
    for text in random_texts():
        expected = text.replace("<|end|>", "").replace("<s>", "")
        assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.decode([*tokenizer.encode_prompt(QUESTION), *tokenizer.eos_ids]) == " Copy red cat."


def test_special_tokens_are_found_by_name(tokenizer, export):
    for each in (tokenizer, Tokenizer.load(export)):
        assert [each.special_id(text) for text in ("<|end|>", "</s>")] == list(reversed(sorted(each.eos_ids)))
        assert [each.special_id(text) for text in ("\u2581red", "red", "\u2581", " ", "<|none|>", "")] == [None] * 6


def test_export_gives_same_ids_here_and_in_transformers(tokenizer, export):
    from transformers import AutoTokenizer

    theirs, again = AutoTokenizer.from_pretrained(export), Tokenizer.load(export)
    assert (again.eos_ids, again.bos_id, again.vocab_size) == (
        tokenizer.eos_ids,
        tokenizer.bos_id,
        tokenizer.vocab_size,
    )
    for text in random_texts():
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        assert theirs(text)["input_ids"] == ids, text
        assert again.decode(ids) == tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": m.role, "content": m.content} for m in QUESTION]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == tokenizer.render(
        QUESTION
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode_prompt(QUESTION)


def test_export_of_export_is_same_files(export, tmp_path):
    Tokenizer.load(export).save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (export / path.name).read_bytes(), path.name
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in export.iterdir()} - {"config.json"}


def test_prompt_is_bare_text_with_beginning_or_rendered_conversation(tokenizer):
    assert tokenizer.encode_prompt("a red") == tokenizer.encode("a red")
    assert tokenizer.render(QUESTION) == "<s><|user|> Copy red cat.<|assistant|>"
    ids = tokenizer.encode_prompt(QUESTION)
    assert ids.count(tokenizer.bos_id) == 1
    assert ids == tokenizer.encode("<|user|> Copy red cat.<|assistant|>")


def test_choice_is_tokens_that_follow_prompt(tokenizer):
    prompt, choices = "Quality (1-10):", (" 1", " 10", " red cat")
    found = tokenizer.encode_choices(prompt, choices)
    assert [tokenizer.encode(prompt) + ids for ids in found] == [tokenizer.encode(prompt + c) for c in choices]
    assert len(found[1]) == 1
    assert tokenizer.encode_choices(QUESTION, [" red"]) == [tokenizer.encode(" red", bos=False)]
    assert tokenizer.encode_choices(prompt, ()) == []
    with pytest.raises(UserError, match="changes the tokens of the prompt"):
        tokenizer.encode_choices("a r", ["eddish"])


def spelled(text, spans):
    """What the spans cover: each character once, with the number of spans that share it."""
    assert all(0 <= begin <= end <= len(text) for begin, end in spans)
    return "".join(text[begin:end] for begin, end in dict.fromkeys(spans))


@pytest.mark.parametrize("text", [" red cat", " héé 🙂 red", " 10\n<|end|> 日本語", ""])
def test_ids_of_a_continuation_know_their_characters(tokenizer, text):
    ids, spans, end = tokenizer.align_continuation("Quality:", text)
    assert end == tokenizer.eos_ids[0]
    assert ids == tokenizer.encode_choices("Quality:", (text,))[0]
    assert len(ids) == len(spans)
    assert spelled(text, spans) == text
    assert spans == sorted(spans)
    exported = Tokenizer.load(tokenizer.directory)
    assert exported.align_continuation("Quality:", text) == (ids, spans, end)


@pytest.mark.parametrize("text", ["red cat", "10 héé\n🙂"])
def test_ids_of_a_response_know_its_characters_without_the_space_of_the_template(tokenizer, export, text):
    ids, mask = tokenizer.encode_example(QUESTION, text)
    found, spans, end = tokenizer.align_continuation(QUESTION, text)
    assert [*found, end] == [i for i, own in zip(ids, mask) if own]
    assert spelled(text, spans) == text
    # Both formats of the same tokenizer agree.
    assert Tokenizer.load(export).align_continuation(QUESTION, text) == (found, spans, end)


def test_begun_message_of_the_assistant_is_continued(tokenizer):
    begun = (*QUESTION, Message("assistant", "Rating:"))
    assert tokenizer.render(begun) == "<s><|user|> Copy red cat.<|assistant|> Rating:"
    assert tokenizer.render(begun, " 10") == "<s><|user|> Copy red cat.<|assistant|> Rating: 10<|end|>"
    assert tokenizer.encode_prompt(begun) == tokenizer.encode(tokenizer.render(begun).removeprefix("<s>"))
    assert tokenizer.encode_choices(begun, [" 10"]) == [tokenizer.encode(" 10", bos=False)]
    ids, spans, _ = tokenizer.align_continuation(begun, " 10")
    assert (ids, spans) == (tokenizer.encode(" 10", bos=False), [(0, 3)])


@pytest.mark.parametrize("content", ["Rating:", "Rating: ", "Two\nlines"])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_begun_message_is_rendered_as_transformers_continues_it(export, tmp_path, content, trim):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(export, tmp_path / "copy")
    template = TEMPLATE.replace("message['content'] }}<|end|>", f"message['content']{trim} }}}}<|end|>")
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    begun = (*QUESTION, Message("assistant", content))
    messages = [vars(message) for message in begun]
    rendered = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert Tokenizer.load(tmp_path / "copy").render(begun) == rendered


def test_mask_is_one_on_response_and_its_end_of_turn(tokenizer):
    ids, mask = tokenizer.encode_example(QUESTION, "red cat")
    prompt = tokenizer.encode_prompt(QUESTION)
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[len(prompt) :] == tokenizer.encode(" red cat<|end|>", bos=False)
    assert ids[-1] in tokenizer.eos_ids


def load_with_template(directory, tmp_path, template) -> Tokenizer:
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    return Tokenizer.load(tmp_path / "copy")


def test_text_after_end_of_turn_is_not_trained(sentencepiece_directory, tmp_path):
    tokenizer = load_with_template(sentencepiece_directory, tmp_path, TEMPLATE + "\n\n")
    ids, mask = tokenizer.encode_example(QUESTION, "red")
    assert ids[-1] in tokenizer.eos_ids
    assert mask[-1] == 1


def test_template_without_end_of_turn_gets_end_of_text(sentencepiece_directory, tmp_path):
    tokenizer = load_with_template(sentencepiece_directory, tmp_path, TEMPLATE.replace("<|end|>", ""))
    ids, mask = tokenizer.encode_example(QUESTION, "red")
    assert (ids[-1], mask[-1]) == (2, 1)


def test_template_that_rewrites_prompt_is_refused(sentencepiece_directory, tmp_path):
    template = "{% if messages[-1]['role'] == 'assistant' %}answered: {% endif %}" + TEMPLATE
    with pytest.raises(UserError, match="not stable when the answer is appended"):
        load_with_template(sentencepiece_directory, tmp_path, template).encode_example(QUESTION, "red")


def test_named_templates_stand_in_for_base_models_own(sentencepiece_directory, tmp_path):
    chatml = Tokenizer.load(sentencepiece_directory, "chatml").render(QUESTION, "red")
    assert chatml == "<s><|im_start|>user\nCopy red cat.<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    llama3 = Tokenizer.load(sentencepiece_directory, "llama3").render(QUESTION)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert llama3 == f"<s>{header.format('user')}Copy red cat.<|eot_id|>{header.format('assistant')}"
    shutil.copyfile(sentencepiece_directory / "tokenizer.model", tmp_path / "tokenizer.model")
    base = Tokenizer.load(tmp_path)
    assert not base.has_chat_template
    with pytest.raises(
        UserError, match=r"no chat template; set model\.chat_template to one of: chatml, gemma, llama3, plain"
    ):
        base.render(QUESTION)


def with_setting(source: Path, directory: Path, **settings) -> Path:
    """Returns a copy with this setting in tokenizer_config.json and with a config.json."""
    shutil.copytree(source, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.mark.parametrize("choice", [True, False])
def test_with_tokenizer_model_setting_says_whether_texts_have_beginning(sentencepiece_directory, tmp_path, choice):
    from transformers import AutoTokenizer

    directory = with_setting(
        sentencepiece_directory, tmp_path / "in", add_bos_token=choice, tokenizer_class="PreTrainedTokenizerFast"
    )
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id == (1 if choice else None)
    assert tokenizer.encode("a")[:-1] == ([1] if choice else [])
    assert AutoTokenizer.from_pretrained(directory)("a")["input_ids"] == tokenizer.encode("a")


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_with_tokenizer_json_file_says_whether_texts_have_beginning(tmp_path, name, choice, begins):
    from transformers import AutoTokenizer

    (tmp_path / "in").mkdir()
    (tmp_path / "file").mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(trained_model(user_defined_symbols=[]))
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": begins}))
    Tokenizer.load(tmp_path / "in").save(tmp_path / "file")
    directory = with_setting(tmp_path / "file", tmp_path / "out", add_bos_token=choice, tokenizer_class=name)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.bos_id == (1 if begins else None)
    theirs = AutoTokenizer.from_pretrained(directory)("a")["input_ids"]
    assert (theirs[0] == 1) == begins
    if name != "LlamaTokenizer":  # which puts a space first, whatever the file says
        assert theirs == tokenizer.encode("a")
    assert Tokenizer.load(directory, "plain").render(QUESTION).startswith("<s>") == begins
    again = tmp_path / "again"
    again.mkdir()
    tokenizer.save(again)
    shutil.copyfile(directory / "config.json", again / "config.json")
    assert AutoTokenizer.from_pretrained(again)("a red cat")["input_ids"] == tokenizer.encode("a red cat")


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_tokenizer_in_bucket_is_read_and_written_as_on_disk(
    sentencepiece_directory, export, tmp_path, monkeypatch, kind
):
    source = sentencepiece_directory if kind == "tokenizer.model" else export
    bucket = memory_bucket(monkeypatch)
    for path in source.iterdir():
        (bucket / path.name).write_bytes(path.read_bytes())
    there, here = Tokenizer.load(bucket), Tokenizer.load(source)
    assert str(there.directory).startswith("gs://")
    assert all(there.encode(text) == here.encode(text) for text in random_texts(50))
    assert there.encode_prompt(QUESTION) == here.encode_prompt(QUESTION)
    out = memory_bucket(monkeypatch)
    there.save(out)
    here.save(tmp_path)
    assert {p.name for p in out.iterdir()} == {p.name for p in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match=r"gs://.*/none holds no tokenizer"):
        Tokenizer.load(bucket / "none")


def test_directory_without_tokenizer_is_said(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)


TEMPLATE_WITH_AN_ERROR = "{% for m in messages %}\n{{ m['content' }}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "is empty"),
        ("tokenizer.model", b"nothing of the kind", "of another kind"),
        ("tokenizer.model", "cut", "cut short"),
        ("tokenizer.json", b"{}", "is not a readable tokenizer"),
        ("tokenizer.json", b"{", "is not a readable tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "is not UTF-8 text"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "is not UTF-8 text"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", {"eos_token": "<none>"}, "eos_token is '<none>', which is not in the tokenizer's"),
        ("tokenizer_config.json", {"bos_token": {"content": "<none>"}}, "bos_token is '<none>', which is not in"),
        ("tokenizer_config.json", {"eos_token": 2}, "eos_token is 2, which is not in"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"900": {"content": "<new>"}}}, "'<new>' has the id 900"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<s>"}}}, "it has the id 1"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<s>"]}, "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is neither a string nor"),
        ("tokenizer_config.json", {"chat_template": TEMPLATE_WITH_AN_ERROR}, "valid Jinja template (line 2)"),
        ("chat_template.jinja", TEMPLATE_WITH_AN_ERROR.encode(), "is not a valid Jinja template (line 2)"),
        ("chat_template.jinja", b"{{ 1 | nothing }}", "is not a valid Jinja template (line 1)"),
        ("added_tokens.json", b'{"<new>": 900}', "'<new>' has the id 900"),
        ("special_tokens_map.json", b'{"eos_token": "<none>"}', "eos_token is '<none>'"),
        ("special_tokens_map.json", b"[]", "is not a JSON object"),
        ("generation_config.json", b"{", "not JSON"),
        ("generation_config.json", b"[]", "is not a JSON object"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; it must be a token id"),
        ("config.json", b'{"eos_token_id": [2, -1]}', "it must be a token id or a list of token ids"),
    ],
)
def test_damaged_file_is_named_in_one_line(tmp_path, name, content, message):
    model = trained_model()
    (tmp_path / "tokenizer.model").write_bytes(model)
    Tokenizer.load(tmp_path)
    if content == "cut":
        content = model[: len(model) // 2]
    (tmp_path / name).write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_tokens_are_also_found_where_older_files_name_them(tmp_path):
    write_byte_level(tmp_path, ["<|begin|>", "<|stop|>"])
    assert Tokenizer.load(tmp_path).eos_ids == ()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert list(tokenizer.eos_ids) == tokenizer.encode("<|stop|>")


def test_beginning_that_only_tokenizer_json_names_is_written_by_templates(tmp_path):
    write_byte_level(tmp_path, ["<|begin|>", "<|stop|>"], bos_token="<|begin|>", eos_token="<|stop|>")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path, "plain")
    assert [tokenizer.bos_id] == tokenizer.encode("<|begin|>", bos=False)
    assert tokenizer.encode_prompt(QUESTION)[0] == tokenizer.bos_id
    assert tokenizer.render(QUESTION).startswith("<|begin|>")


def test_tokens_added_with_gap_count_up_to_last_id(tmp_path):
    write_byte_level(tmp_path, ["<|stop|>"], eos_token="<|stop|>")
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["vocab"] |= {"<|stop|>": 1000}
    file["added_tokens"][0]["id"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == (1000,)
    assert tokenizer.vocab_size == 1001


def test_file_that_asks_for_truncation_and_padding_does_not_get_it(tmp_path):
    write_byte_level(tmp_path, ["<|pad|>"])
    path = tmp_path / "tokenizer.json"
    whole = Tokenizer.load(tmp_path).encode("red cat " * 20)
    fast = tokenizers.Tokenizer.from_file(str(path))
    fast.enable_truncation(8)
    fast.enable_padding(length=64, pad_token="<|pad|>", pad_id=fast.token_to_id("<|pad|>"))
    fast.save(str(path))
    assert Tokenizer.load(tmp_path).encode("red cat " * 20) == whole


def real(name: str) -> Path:
    """Returns a published tokenizer file, which cannot be part of this repository."""
    path = Path(os.environ.get("ISHEEP_JAX_TOKENIZERS", "none")) / name
    if not path.exists():
        pytest.skip(f"set ISHEEP_JAX_TOKENIZERS to a directory that holds {name}")
    return path


def test_llama_2s_own_tokenizer_keeps_its_ids_when_exported(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copyfile(real("llama2.tokenizer.model"), tmp_path / "in" / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path / "in", "chatml")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32_000, 1, (2,))
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    for text in (*random_texts(50), "Hello, wörld! 日本語 def f(x):\n    return x  # tabs\t", "  two  spaces "):
        if "<s>" not in text:
            assert again.encode(text) == tokenizer.encode(text), text
            assert again.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_qwen2s_own_tokenizer_has_chatml_and_no_beginning(tmp_path):
    shutil.copyfile(real("qwen2.tokenizer.json"), tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path, "chatml")
    assert tokenizer.bos_id is None
    end = tokenizer.encode("<|im_end|>")
    assert tokenizer.eos_ids == tuple(end)
    ids, mask = tokenizer.encode_example(QUESTION, "red cat")
    assert ids[-1:] == end
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "red cat"
