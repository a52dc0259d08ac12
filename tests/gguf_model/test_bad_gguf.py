"""GGUF files that cannot be read: each is one line that names the file and what is wrong."""

import struct

import pytest
from small_tokenizers import write_byte_level

from isheep_jax.checkpoint.hf_config import read_architecture
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
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not implemented"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False is not implemented; only True is"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5"),
        ({"llama.residual_scale": 0.25}, "llama.residual_scale=0.25"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear=2.0"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor=1.5"),
        ({"llama.attention.value_length": 2}, "values of 2 numbers for keys of"),
        ({"general.type": "adapter"}, "is a LoRA adapter, not a model"),
        ({"general.type": "mmproj"}, "a file of the type 'mmproj'"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is '0'"),
        ({"llama.attention.head_count_kv": 0}, "llama.attention.head_count_kv is '0'"),
        ({"llama.attention.head_count": 4.0}, "llama.attention.head_count is '4.0'"),
        ({"llama.attention.key_length": 0}, "llama.attention.key_length is '0'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is 'nan'"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta=-1.0 has the wrong type or sign"),
        ({"llama.block_count": 2**31}, "num_hidden_layers=2147483648"),
        ({"tokenizer.ggml.bos_token_id": 1.5}, "tokenizer.ggml.bos_token_id is '1.5'"),
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
        ({"general.alignment": 0}, "general.alignment is '0'"),
    ],
)
def test_file_of_another_kind_is_refused_by_name(changed, reason, make):
    assert reason in refusal(make(**changed))


@pytest.mark.parametrize("left", [0, 3, 20, 100, 900, 5_000, -1])
def test_file_cut_anywhere_is_refused(left, make):
    path = make()
    path.write_bytes(path.read_bytes()[:left])
    assert "cut short" in (message := refusal(path)) or "not a GGUF file" in message


def test_factor_without_a_type_scales_as_in_llama_cpp(make):
    path = make(**{"llama.rope.scaling.factor": 2.0})
    scaling = read_architecture(path.rename(path.with_name("scaled.gguf"))).rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)
    assert read_architecture(make(**{"llama.rope.scaling.factor": 1.0})).rope_scaling is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "it has tensor blk.0.ffn_up.weight twice"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens", "its metadata has tokenizer.ggml.tokens twice"),
        (b"blk.0.ffn_up.weight", b"\x1b[2Jffn_up.weight\n\n", r"model.layers.0.mlp.up_proj.weight is missing"),
        (b"blk.0.ffn_up.weight", b"\xff\xfe0.ffn_up.weight", "is not UTF-8"),
    ],
)
def test_names_are_there_once_and_shown_as_text(old, new, reason, make):
    path = make()
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    message = refusal(path)
    assert message.isprintable()
    assert reason in message


def test_tensors_that_overlap_and_dimensions_beyond_all_files_are_refused(make):
    path = make()
    data = path.read_bytes()
    tensor = b"blk.1.ffn_up.weight"
    at = data.index(tensor) + len(tensor)  # dimensions, two sizes, type, offset
    path.write_bytes(data[: at + 24] + struct.pack("<Q", 0) + data[at + 32 :])
    assert "overlaps" in refusal(path)
    path.write_bytes(data[:at] + struct.pack("<I", 2**31) + data[at + 4 :])
    assert "has 2147483648 dimensions" in refusal(path)
    path.write_bytes(data[: at + 4] + struct.pack("<QQ", 2**63, 2**63) + data[at + 20 :])
    assert "is cut short" in refusal(path)


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
