"""GGUF files that cannot be read: each is one line that names the file and what is wrong."""

import struct

import pytest
from small_tokenizers import write_byte_level

from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.errors import UserError
from isheep_jax.runtime.locate import locate_model

gguf = pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf")
pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping", reason="pip install 'transformers>=5.24'")

from gguf_files import byte_level_metadata, write_gguf  # noqa: E402 (needs gguf)


@pytest.fixture
def make(tmp_path, small_checkpoint):
    """Returns a GGUF file of the small model; arguments change its metadata."""
    words = write_byte_level(tmp_path / "words", ["<|end|>"], eos_token="<|end|>")

    def write(**changed):
        values = byte_level_metadata(words) | {
            "ggml.tokens": ["t", "0", *(f"t{i}" for i in range(126))],
            "ggml.merges": ["t 0"],
        }
        values |= {"ggml.token_type": [1] * 128, "ggml.eos_token_id": 5}
        return write_gguf(
            small_checkpoint, tmp_path / "model.gguf", quantization="Q8_0", tokenizer=values, changed=changed
        )

    return write


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        open_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_model_of_these_tests_is_whole(make):
    path = make()
    assert open_model(path).tokenizer.vocab_size == 128
    assert open_model(path.rename(path.with_suffix(".GGUF"))).tokenizer.vocab_size == 128


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"general.architecture": "mamba"}, "the architecture 'mamba' is not read"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.block_count": None}, "has no llama.block_count"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not implemented"),
        ({"llama.rope.dimension_count": 2}, "partial_rotary_factor"),
        ({"llama.attention.head_count": 6}, "is not that of 6 heads"),
        ({"llama.block_count": 1}, "belongs to no parameter"),
        ({"llama.block_count": 3}, "is missing"),
        ({"llama.feed_forward_length": 7}, "config.json asks for"),
        ({"split.count": 2}, "one part of several"),
        ({"tokenizer.ggml.model": "t5"}, "the tokenizer 't5'"),
        ({"tokenizer.ggml.pre": "tekken"}, "the pre-tokenizer 'tekken'"),
        ({"tokenizer.ggml.pre": None}, "the pre-tokenizer None"),
        ({"tokenizer.ggml.merges": ["t1 t2 t3"]}, "its tokenizer cannot be read"),
        ({"tokenizer.ggml.eos_token_id": 999}, "outside of 128 tokens"),
        ({"tokenizer.ggml.eos_token_id": None}, "no end-of-sequence token"),
        ({"llama.rope.dimension_count": "4"}, "llama.rope.dimension_count is '4'"),
        ({"tokenizer.ggml.tokens": "t"}, "tokenizer.ggml.tokens is 't'"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges is '[1, 2]'"),
        ({"tokenizer.ggml.token_type": [1] * 127}, "token_type has 127 entries for 128 tokens"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is '3'"),
        ({"split.count": "3"}, "split.count is '3'"),
        ({"general.alignment": 7}, "general.alignment=7 is not a positive multiple of 8"),
    ],
)
def test_file_of_another_kind_is_refused_by_name(changed, reason, make):
    assert reason in refusal(make(**changed))


@pytest.mark.parametrize("left", [0, 3, 20, 100, 900, 5_000, -1])
def test_file_cut_anywhere_is_refused(left, make):
    path = make()
    path.write_bytes(path.read_bytes()[:left])
    assert "cut short" in (message := refusal(path)) or "not a GGUF file" in message


def test_other_formats_and_versions_are_refused(make):
    path = make()
    data = path.read_bytes()
    path.write_bytes(b"PK" + data[2:])
    assert "is not a GGUF file" in refusal(path)
    path.write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    assert "GGUF version 1; versions 2 and 3 are read" in refusal(path)
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    assert "is a big-endian GGUF file" in refusal(path)


@pytest.mark.parametrize("count", [12, 16])
def test_damaged_count_in_header_is_refused_without_taking_memory(count, make):
    path = make()
    data = bytearray(path.read_bytes())
    data[count - 4 : count + 4] = struct.pack("<Q", 2**62)
    path.write_bytes(data)
    assert "announces" in refusal(path)


@pytest.mark.parametrize(("number", "name"), [(9, "Q8_1"), (250, "number 250")])
def test_quantization_that_gguf_cannot_dequantize_is_refused_by_name(number, name, make):
    path = make()
    data = path.read_bytes()
    tensor = b"blk.0.ffn_up.weight"
    at = data.index(tensor) + len(tensor) + 4 + 2 * 8  # after the number of dimensions and the two of them
    path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
    message = refusal(path)
    assert f"ggml type {name}" in message
    assert "blk.0.ffn_up.weight" in message


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--model\.path: there is no file .*model\.gguf"):
        locate_model(str(tmp_path / "model.gguf"), "--model.path")


def test_missing_package_is_named(make, monkeypatch):
    path = make()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "isheep_jax\[gguf\]"'):
        open_model(path)
