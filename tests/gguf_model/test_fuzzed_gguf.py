"""Whatever a GGUF file holds, it is read or refused in one line, in little time and memory."""

import struct

import pytest
from fuzzed import FUZZED, Quiet, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import write_byte_level

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import find_tensors

pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf")

from gguf_files import byte_level_metadata, write_gguf

NUMBERS = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_checkpoint):
    """A GGUF file with RoPE frequencies, and the offset of its first tensor's bytes."""
    directory = tmp_path_factory.mktemp("gguf")
    words = write_byte_level(directory / "words", ["<|end|>"], eos_token="<|end|>")
    path = write_gguf(small_checkpoint, directory / "model.gguf", tokenizer=byte_level_metadata(words))
    data = path.read_bytes()
    return Quiet(data), data.index(b"output_norm.weight") + 100


def read(path) -> None:
    find_tensors(path, read_architecture(path))


def check(directory, content) -> None:
    # A file of its own each time: what was read of a file is remembered while its size and time stay.
    path = directory / f"{len(list(directory.iterdir()))}.gguf"
    path.write_bytes(content)
    read_or_refuse(read, path)


def test_file_of_these_tests_is_read(whole, tmp_path):
    path = tmp_path / "whole.gguf"
    path.write_bytes(whole[0])
    assert read_or_refuse(read, path)


@FUZZED
@given(data=st.data())
def test_header_with_other_bytes_is_read_or_refused(whole, tmp_path, data):
    content, end = whole
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end))
        content = (
            content[:at] + data.draw(st.binary(min_size=1, max_size=3)) + content[at + data.draw(st.integers(0, 3)) :]
        )
    check(tmp_path, content)


@FUZZED
@given(key=st.sampled_from([b"llama.", b"tokenizer.ggml", b"general.", b"blk."]), data=st.data())
def test_other_values_in_header_are_read_or_refused(whole, tmp_path, key, data):
    """Types, counts, dimensions and offsets are numbers of four or eight bytes after a name."""
    content, _ = whole
    places = [i for i in range(len(content) - len(key)) if content.startswith(key, i)]
    name = data.draw(st.sampled_from(places))
    at = name + data.draw(st.integers(len(key), 60))
    number = data.draw(NUMBERS)
    packed = struct.pack("<Q", number) if data.draw(st.booleans()) else struct.pack("<I", number % 2**32)
    check(tmp_path, content[:at] + packed + content[at + len(packed) :])
