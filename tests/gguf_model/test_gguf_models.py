"""A GGUF file gives the weights, settings and token ids of the Hugging Face directory that it was made from."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from etils import epath
from memory_bucket import memory_bucket
from small_tokenizers import random_texts, write_byte_level, write_sentencepiece

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.checkpoint.pretrained import open_model, weights_digest
from isheep_jax.config import SFTConfig
from isheep_jax.model.architecture import RopeScaling
from isheep_jax.planning.models import planned_architecture
from isheep_jax.runtime.fine_tune import adapter_base, fine_tune
from isheep_jax.runtime.locate import locate_model
from isheep_jax.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf")
pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping", reason="pip install 'transformers>=5.24'")

from gguf_files import byte_level_metadata, sentencepiece_metadata, write_gguf  # noqa: E402 (needs gguf)

FIXTURES = ["llama", "llama_linear_rope", "llama_scaled_rope", "qwen2", "qwen3", "gemma3"]
SPECIAL = ["<s>", "<|end|>", "<|user|>"]


@pytest.fixture
def directory(tmp_path):
    """Returns a copy of a fixture. What a GGUF file cannot say has the value that llama.cpp takes."""

    def copy(name):
        directory = shutil.copytree(parity.FIXTURES / name, tmp_path / name)
        config = json.loads((directory / "config.json").read_text())
        if name == "gemma3":
            config["query_pre_attn_scalar"] = config["head_dim"]
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return copy


@pytest.fixture
def with_tokenizer(tmp_path):
    """Returns a directory of a small Llama with a byte-level tokenizer, and its GGUF file."""

    def make(pre="gpt-2", metadata=None, **config):
        config = {"bos_token": "<s>", "eos_token": "<|end|>"} | config
        words = write_byte_level(tmp_path / "words", SPECIAL, plain=("<think>",), **config)
        architecture, params = parity.load(parity.FIXTURES / "llama")
        rows = Tokenizer.load(words).vocab_size
        embeddings = np.random.default_rng(0).normal(size=(rows, architecture.hidden_size))
        params = params | {"embed": jnp.asarray(embeddings, jnp.float32)}
        tokenizer = Tokenizer.load(words)
        architecture = dataclasses.replace(architecture, vocab_size=rows, bos_token_id=tokenizer.bos_id)
        save_checkpoint(tmp_path / "model", params, architecture, tokenizer)
        (tmp_path / "model" / "config.json").write_text(
            json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()) | {"eos_token_id": None})
        )
        values = byte_level_metadata(words, pre, **({"ggml.add_bos_token": True} | (metadata or {})))
        return tmp_path / "model", write_gguf(tmp_path / "model", tmp_path / "model.gguf", tokenizer=values)

    return make


@pytest.mark.parametrize("name", FIXTURES)
def test_file_gives_weights_and_logits_of_directory(name, directory, tmp_path):
    source = directory(name)
    architecture, params = parity.load(source)
    read, loaded = parity.load(write_gguf(source, tmp_path / "model.gguf"))
    unlike = {
        field.name
        for field in dataclasses.fields(read)
        if getattr(read, field.name) != getattr(architecture, field.name)
    }
    # Token ids come from the tokenizer's metadata; rounding to float32 shows in the rest.
    assert unlike <= {"norm_eps", "bos_token_id", "eos_token_ids", "rope_scaling"}
    np.testing.assert_allclose(read.norm_eps, architecture.norm_eps, rtol=1e-6)
    theirs, ours = (parity.by_huggingface_name(tree, architecture) for tree in (params, loaded))
    for tensor, value in theirs.items():
        # A norm is stored with one added.
        np.testing.assert_allclose(ours[tensor], value, rtol=0, atol=2e-7 if name == "gemma3" else 0, err_msg=tensor)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, architecture.vocab_size, (2, 250)))
    expected = parity.plain_logits(params, architecture, tokens)
    np.testing.assert_allclose(
        parity.plain_logits(loaded, read, tokens), expected, rtol=0, atol=1e-5 * parity.largest(expected)
    )


def test_file_in_bucket_is_read_like_one_on_disk(tmp_path, monkeypatch):
    path = write_gguf(parity.FIXTURES / "llama", tmp_path / "model.gguf", quantization="Q8_0")
    stored = memory_bucket(monkeypatch) / "model.gguf"
    stored.write_bytes(path.read_bytes())
    assert locate_model(str(stored)) == stored
    (one, local), (other, remote) = parity.load(path), parity.load(stored)
    assert one == other
    for a, b in zip(jax.tree.leaves(local), jax.tree.leaves(remote), strict=True):
        np.testing.assert_array_equal(a, b)
    assert weights_digest(stored) == weights_digest(epath.Path(path))


def test_rope_scaling_of_llama_3_follows_from_frequencies(directory, tmp_path):
    source = directory("llama_scaled_rope")
    scaling = read_architecture(write_gguf(source, tmp_path / "model.gguf")).rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_quantized_rows_are_those_that_gguf_dequantizes(quantization, tmp_path, small_checkpoint):
    path = write_gguf(small_checkpoint, tmp_path / "model.gguf", quantization=quantization)
    kind = gguf.GGMLQuantizationType[quantization]
    architecture, exact = parity.load(small_checkpoint)
    _, params = parity.load(path)
    for tree in (exact, params):
        tree["layers"] = {name: tree["layers"][name] for name in ("wv", "w_up")}
    read, whole = params["layers"]["w_up"], exact["layers"]["w_up"]
    for layer in range(architecture.layers):
        rows = np.asarray(whole[layer]).T  # as Hugging Face stores them
        expected = gguf.dequantize(gguf.quantize(np.ascontiguousarray(rows), kind), kind)
        np.testing.assert_array_equal(np.asarray(read[layer]).T, expected)


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_special_tokens_ends_and_prefix_are_those_of_directory(pre, with_tokenizer):
    directory, path = with_tokenizer(pre)
    theirs, ours = open_model(directory).tokenizer, open_model(path).tokenizer
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (theirs.bos_id, theirs.eos_ids, theirs.vocab_size)
    assert ours.encode("<|user|>a<think>b<|end|>") == theirs.encode("<|user|>a<think>b<|end|>")
    assert ours.decode(ours.encode("a<|user|>é🙂")) == "aé🙂"


def test_texts_have_ids_of_directory(with_tokenizer):
    directory, path = with_tokenizer()
    theirs, ours = open_model(directory).tokenizer, open_model(path).tokenizer
    for text in random_texts():
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(("name", "dummy_prefix"), [("llama", True), ("gemma3", False)])
def test_sentencepiece_texts_have_ids_of_sentencepiece(name, dummy_prefix, tmp_path):
    words = write_sentencepiece(tmp_path / "words", user_defined_symbols=[], add_dummy_prefix=dummy_prefix)
    path = write_gguf(parity.FIXTURES / name, tmp_path / "model.gguf", tokenizer=sentencepiece_metadata(words))
    theirs, ours = Tokenizer.load(words), Tokenizer.load(path)
    assert ours.bos_id == theirs.bos_id
    # transformers puts no space before what begins with one or follows a special token; SentencePiece does.
    for text in (text for text in random_texts() if "<s>" not in text and text[:1] != " "):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize(("pre", "begins"), [("gpt-2", False), ("llama-bpe", True)])
def test_without_flag_only_llama_3_begins_with_bos(pre, begins, with_tokenizer):
    _, path = with_tokenizer(pre, {"ggml.add_bos_token": None})
    assert (open_model(path).tokenizer.bos_id is not None) == begins


def test_end_of_turn_and_template_come_from_metadata(with_tokenizer):
    template = "{{ messages[0]['content'] }}<|user|>"
    _, path = with_tokenizer(metadata={"ggml.eot_token_id": 300, "chat_template": template})
    tokenizer = open_model(path).tokenizer
    assert tokenizer.chat_template == template
    assert 300 in tokenizer.eos_ids


def test_saved_model_of_file_is_saved_model_of_directory(with_tokenizer, tmp_path):
    for source, out in zip(with_tokenizer(), (tmp_path / "from_directory", tmp_path / "from_file")):
        model = open_model(source, "plain")
        save_checkpoint(out, parity.load(source)[1], model.architecture, model.tokenizer)
    theirs, ours = (open_model(tmp_path / name) for name in ("from_directory", "from_file"))
    assert ours.tokenizer.encode("the red cat (1-10)") == theirs.tokenizer.encode("the red cat (1-10)")
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("from_directory", "from_file"))
    assert one == other


def test_file_is_found_named_planned_and_digested(with_tokenizer, tmp_path):
    _, path = with_tokenizer()
    found = locate_model(str(path))
    assert found == epath.Path(path)
    assert adapter_base(str(path), found) == str(path.resolve())
    assert planned_architecture(str(path), tmp_path) == open_model(path).architecture
    before = weights_digest(found)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights_digest(found) != before
    assert len(open_model(found).digest()) == 64


def test_fine_tuned_file_is_directory_with_its_tokenizer_and_adapter_names_file(with_tokenizer, tmp_path):
    _, path = with_tokenizer()
    sft = SFTConfig(sequence_length=64, batch_size=8, epochs=1, warmup_steps=0, validation_fraction=0.0)
    out = tmp_path / "tuned"
    fine_tune(str(path), [("the red cat", "answer")] * 8, out, sft=sft, chat_template="plain")
    base, tuned = open_model(path), open_model(out / "model")
    assert tuned.tokenizer.encode("the red cat (1-10)") == base.tokenizer.encode("the red cat (1-10)")
    assert tuned.architecture.eos_token_ids == base.tokenizer.eos_ids
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(path.resolve())
