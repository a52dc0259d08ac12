import json

import pytest
import sentencepiece
from small_tokenizers import random_texts, trained_model, write_sentencepiece

from isheep_jax.text.tokenizer import Tokenizer

# Texts that tokenizers treat differently: unknown characters, leading and repeated spaces, line breaks, other scripts.
HARD_TEXTS = [
    "",
    " ",
    "   ",
    "red",
    " red",
    "  red  cat ",
    "red\n\n\ncat\n",
    "\n",
    "\n \n red",
    "日本語のテキスト。 赤い猫",
    "🙂👩‍👩‍👧 red 🇩🇪",
    "größer naïve ﬁ Ⅳ e\u0301",
    "tab\tred\u00a0cat\u200b",
    "▁red ▁",
    "<unk> <0x41> [INST] red",
    "a" * 70,
]


BREAKS = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁"]
# Options of SentencePiece and whether tokenizer.json can express the model.
MODELS = {
    "Llama 2's kind": ({"add_dummy_prefix": True, "user_defined_symbols": []}, True),
    "Gemma's kind": ({"user_defined_symbols": BREAKS}, True),
    "a space put before symbols": ({"add_dummy_prefix": True}, False),
    "no bytes": ({"byte_fallback": False}, False),
    "NFKC": (
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "add_dummy_prefix": True},
        False,
    ),
    "unigram": ({"model_type": "unigram", "vocab_size": 310, "add_dummy_prefix": True}, False),
    "unigram with line breaks": ({"model_type": "unigram", "vocab_size": 310, "user_defined_symbols": BREAKS}, False),
    "unigram, NFKC": (
        {"model_type": "unigram", "vocab_size": 310, "normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
        False,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_hard_texts_get_sentencepieces_ids_before_and_after_export(tmp_path, kind):
    from transformers import AutoTokenizer

    options, portable = MODELS[kind]
    source, out = write_sentencepiece(tmp_path / "in", **options), tmp_path / "out"
    out.mkdir()
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    tokenizer = Tokenizer.load(source)
    tokenizer.save(out)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = Tokenizer.load(out)
    assert (out / "tokenizer.json").exists() == portable
    assert (tokenizer.export_note is None) == (again.export_note is None) == portable
    theirs = AutoTokenizer.from_pretrained(out) if portable else None
    for text in HARD_TEXTS:
        ids = model.encode(text)
        assert tokenizer.encode(text, bos=False) == ids, text
        assert again.encode(text) == tokenizer.encode(text) == [1, *ids], text
        expected = model.decode(ids)
        assert tokenizer.spell(ids) == again.spell(ids) == expected, text
        assert tokenizer.decode(ids) == again.decode(ids) == expected, text
        if portable:
            assert theirs(text)["input_ids"] == [1, *ids], text


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}),
        ({"add_dummy_prefix": True, "user_defined_symbols": []}, {"tokenizer_class": "LlamaTokenizer"}),
    ],
    ids=["no beginning", "a space put first"],
)
def test_export_keeps_ids_whatever_tokenizer_puts_first(tmp_path, options, config):
    from transformers import AutoTokenizer

    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(trained_model(**options))
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    for text in random_texts(100):
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        assert theirs(text)["input_ids"] == ids, text
        assert again.decode(ids) == tokenizer.decode(ids), text


@pytest.mark.parametrize(
    "options",
    [{"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"treat_whitespace_as_suffix": True}],
    ids=str,
)
def test_model_that_tokenizer_json_cannot_express_is_exported_unchanged(tmp_path, options):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "tokenizer.model").write_bytes(trained_model(**options))
    tokenizer = Tokenizer.load(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = Tokenizer.load(tmp_path / "out")
    assert all(again.encode(text) == tokenizer.encode(text) for text in random_texts(100))
