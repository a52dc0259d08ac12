"""No token id is beyond the model's embeddings, and tokens that files name next to the vocabulary are tokens."""

import json
import shutil
from pathlib import Path

import pytest
from small_tokenizers import random_texts, write_byte_level, write_sentencepiece

from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.errors import UserError
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "isheep_jax" / "tiny" / "checkpoint"
ROWS = json.loads((TINY / "config.json").read_text())["vocab_size"]
TEXT = "Swap <image> and <pad> red."
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change(path: Path, edit) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def add_to_fast(model: Path, *tokens: str) -> None:
    """Adds tokens as Gemma 3's own file has its image token: in the file and in its config."""
    added = [{"id": ROWS + i, "content": token, **FLAGS} for i, token in enumerate(tokens)]
    change(model / "tokenizer.json", lambda file: file["added_tokens"].extend(added))
    decoder = {str(token["id"]): {"content": token["content"], "special": True} for token in added}
    change(model / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=decoder))


def add_to_sentencepiece(model: Path, *tokens: str) -> None:
    """Adds tokens as copies of Llama 2 have them: tokenizer.model alone, and added_tokens.json."""
    (model / "tokenizer.json").unlink()
    (model / "added_tokens.json").write_text(json.dumps({token: ROWS + i for i, token in enumerate(tokens)}))


@pytest.mark.parametrize("add", [add_to_fast, add_to_sentencepiece])
@pytest.mark.parametrize("tokens", [("<image>",), ("<pad>", "<image>")])
def test_added_token_without_an_embedding_is_plain_text_and_the_rest_is_unchanged(model, add, tokens):
    add(model, *tokens)
    tokenizer, tiny = open_model(model).tokenizer, Tokenizer.load(TINY)
    assert tokenizer.vocab_size == tiny.vocab_size == ROWS
    assert (tokenizer.eos_ids, tokenizer.bos_id) == (tiny.eos_ids, tiny.bos_id)
    question = (Message("user", TEXT),)
    assert tokenizer.encode(TEXT) == tiny.encode(TEXT)
    assert tokenizer.encode_example(question, TEXT) == tiny.encode_example(question, TEXT)
    assert tokenizer.special_id("<image>") is None
    assert max(tokenizer.encode(TEXT)) < ROWS


@pytest.mark.parametrize("add", [add_to_fast, add_to_sentencepiece])
def test_model_with_such_a_token_is_saved_so_that_it_opens_again(model, tmp_path, add):
    add(model, "<image>")
    tokenizer = open_model(model).tokenizer
    again = Path(shutil.copytree(model, tmp_path / "again", ignore=shutil.ignore_patterns("*token*")))
    tokenizer.save(again)
    assert open_model(again).tokenizer.encode(TEXT) == tokenizer.encode(TEXT)


def test_end_or_beginning_without_an_embedding_is_refused(model):
    add_to_fast(model, "<stop>")
    change(model / "tokenizer_config.json", lambda config: config.update(eos_token="<stop>"))
    with pytest.raises(UserError, match="eos_token is '<stop>', which is not in the tokenizer's vocabulary"):
        open_model(model)


def test_ordinary_vocabulary_beyond_the_embeddings_is_another_models(model):
    change(model / "tokenizer.json", lambda file: file["model"]["vocab"].update({"unheard": ROWS}))
    with pytest.raises(UserError, match=f"vocab_size={ROWS}, but the tokenizer has {ROWS + 1} tokens"):
        open_model(model)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("write", [write_sentencepiece, lambda place: write_byte_level(place, ["</s>"])])
def test_token_that_only_a_file_beside_the_vocabulary_names_is_one_here_and_in_transformers(tmp_path, write, where):
    from transformers import AutoTokenizer

    write(tmp_path / "in")
    first = Tokenizer.load(tmp_path / "in").vocab_size
    names = ("<|im_start|>", "<|im_end|>")
    if where == "added_tokens.json":
        content = {name: first + i for i, name in enumerate(names)}
    else:
        decoder = {str(first + i): {"content": name, "special": True} for i, name in enumerate(names)}
        content = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (tmp_path / "in" / where).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path / "in")
    assert tokenizer.vocab_size == first + 2
    assert first + 1 in tokenizer.eos_ids
    ids = tokenizer.encode("<|im_start|>red cat<|im_end|>", bos=False)
    assert (ids[0], ids[-1]) == (first, first + 1)
    assert ids[1:-1] == tokenizer.encode("red cat", bos=False)
    assert tokenizer.decode(ids) == "red cat"
    assert tokenizer.spell(ids) == "<|im_start|>red cat<|im_end|>"
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    again, theirs = Tokenizer.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*random_texts(20), "<|im_end|>a<|im_start|> red"):
        assert tokenizer.encode(text) == again.encode(text) == theirs(text)["input_ids"], text
    assert again.decode(ids) == "red cat"


def test_rows_that_are_no_token_are_known_by_their_ranges(tmp_path):
    place = write_byte_level(tmp_path, ["<|stop|>"], eos_token="<|stop|>")
    size = Tokenizer.load(place).vocab_size

    def move(file):
        file["model"]["vocab"]["<|stop|>"] = file["added_tokens"][0]["id"] = size + 4

    change(place / "tokenizer.json", move)
    tokenizer = Tokenizer.load(place, rows=size + 8)
    assert tokenizer.missing_ids(size + 8) == ((size - 1, size + 4), (size + 5, size + 8))
    # An end that only the model's files name by its id may be drawn.
    (place / "config.json").write_text(json.dumps({"eos_token_id": size + 6}))
    tokenizer = Tokenizer.load(place, rows=size + 8)
    assert tokenizer.missing_ids(size + 8) == ((size - 1, size + 4), (size + 5, size + 6), (size + 7, size + 8))
    assert Tokenizer.load(TINY).missing_ids(ROWS) == ()
    assert Tokenizer.load(TINY).missing_ids(ROWS + 64) == ((ROWS, ROWS + 64),)
    with_model_alone = write_sentencepiece(tmp_path / "model")
    size = Tokenizer.load(with_model_alone).vocab_size
    assert Tokenizer.load(with_model_alone).missing_ids(size + 3) == ((size, size + 3),)
    assert Tokenizer.load(with_model_alone).decode([size, size + 2]) == ""


def test_vocabulary_of_a_newer_library_says_which_one_is_here(model):
    import tokenizers

    change(model / "tokenizer.json", lambda file: file["model"].update(type="SuperBPE"))
    with pytest.raises(UserError, match=f"a newer version of the tokenizers library than {tokenizers.__version__} may"):
        open_model(model)


def test_saved_template_is_in_both_places_where_tools_look_for_it(tmp_path):
    tokenizer = Tokenizer.load(TINY)
    tokenizer.save(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == template
    assert template == tokenizer.chat_template
