"""Whatever the files of a model hold, they are read or refused in one line, in little time and memory."""

import json
import shutil

import pytest
from fuzzed import FUZZED, Quiet, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import find_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**12, 10**400, -(10**30), 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")]),
)
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["x" * 100_000, "\x1b[2J", "\ud800", "default", "llama3", "sliding_attention", "F32", "32"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["rope_type", "factor", "rope_theta", "full_attention", "a"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def read(model) -> None:
    find_tensors(model, read_architecture(model))


@pytest.fixture(scope="module")
def model(small_checkpoint, tmp_path_factory):
    """A model that the tests write into; each writes the same file again."""
    return shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("fuzzed") / "model")


@pytest.fixture
def config(model):
    before = (model / "config.json").read_text()
    yield json.loads(before)
    (model / "config.json").write_text(before)


@pytest.fixture
def weights(model):
    before = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(before[:8], "little")
    yield json.loads(before[8 : 8 + length]), Quiet(before[8 + length :])
    (model / WEIGHTS).write_bytes(before)


def write_weights(model, header: str, data: bytes) -> None:
    text = header.encode("utf-8", "surrogatepass")
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def dumped(value) -> str:
    return json.dumps(value).replace("Infinity", "1e999").replace("NaN", "1e-999")


@FUZZED
@given(data=st.data())
def test_config_json_is_read_or_refused(model, config, data):
    names = st.one_of(
        st.sampled_from(sorted(config)),
        st.sampled_from(["rope_scaling", "rope_theta", "layer_types", "sliding_window", "quantization_config", "x"]),
    )
    changed = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    (model / "config.json").write_text(dumped(config | changed))
    read_or_refuse(read, model)


@FUZZED
@given(st.one_of(st.binary(max_size=64), st.sampled_from([b"[" * 200_000, b'{"a":' * 200_000, b"1" * 200_000])))
def test_config_json_of_anything_is_refused(model, config, content):
    (model / "config.json").write_bytes(content)
    assert not read_or_refuse(read, model)


@FUZZED
@given(data=st.data())
def test_weights_header_is_read_or_refused(model, weights, data):
    header, tensors = weights
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "name"]))
    value = data.draw(st.one_of(VALUES, st.lists(NUMBERS, min_size=2, max_size=2)))
    changed = {key: dict(entry) for key, entry in header.items()}
    if field == "all":
        changed[name] = value
    elif field == "name":
        changed[data.draw(st.text(max_size=10))] = changed.pop(name)
    else:
        changed[name][field] = value
    write_weights(model, dumped(changed), tensors)
    read_or_refuse(read, model)


@FUZZED
@given(data=st.data())
def test_weights_with_other_bytes_are_read_or_refused(model, weights, data):
    header, tensors = weights
    content = bytearray(json.dumps(header).encode())
    content = len(content).to_bytes(8, "little") + content
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + data.draw(st.integers(0, 3)) :]
    (model / WEIGHTS).write_bytes(content + tensors)
    read_or_refuse(read, model)


@FUZZED
@given(
    st.one_of(
        VALUES,
        st.dictionaries(st.just("weight_map"), VALUES, min_size=1),
        st.fixed_dictionaries(
            {
                "weight_map": st.dictionaries(
                    st.text(max_size=5),
                    st.one_of(st.text(max_size=8), st.sampled_from(["shard.safetensors", "../x.safetensors", "", "."])),
                )
            }
        ),
    )
)
def test_index_of_anything_is_refused(model, weights, content):
    (model / WEIGHTS).rename(model / "shard.safetensors")
    try:
        (model / INDEX).write_text(dumped(content))
        assert not read_or_refuse(read, model)
    finally:
        (model / INDEX).unlink()
        (model / "shard.safetensors").rename(model / WEIGHTS)
