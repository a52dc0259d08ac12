"""Damaged and unsuitable model directories: each is one line that names the file, and nothing is written."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from meshes import mesh_of
from safetensors.numpy import load_file, save_file

from isheep_jax import generate, train
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.cli.errors import run_command
from isheep_jax.errors import UserError
from isheep_jax.sharding import TRAIN_RULES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ENDS = {"eos_token_id": None}


def change_json(name, **fields):
    def damage(model):
        path = model / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in (values | fields).items() if v != "DELETE"}))

    return damage


def change_tensors(change):
    def damage(model):
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)

    return damage


def write(name, content):
    def damage(model):
        (model / name).write_bytes(content)

    return damage


def remove(*names):
    def damage(model):
        for name in names:
            (model / name).unlink()

    return damage


def truncate(name, missing):
    def damage(model):
        path = model / name
        path.write_bytes(path.read_bytes()[:-missing])

    return damage


def all_of(*steps):
    def damage(model):
        for step in steps:
            step(model)

    return damage


def move_weights(name):
    def damage(model):
        (model / WEIGHTS).rename(model / name)

    return damage


def index_of(file, missing=(), extra=()):
    """Writes an index that says that `file` holds the tensors."""

    def damage(model):
        stored = model / WEIGHTS if (model / WEIGHTS).exists() else model / file
        names = [n for n in load_file(stored) if n not in missing] + list(extra)
        (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))

    return damage


def change_header(change):
    """Rewrites the header of the weights and keeps the bytes of the tensors."""

    def damage(model):
        content = (model / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).replace("Infinity", "1e400").encode()
        (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def change_bytes(old, new):
    """Replaces bytes of the weights by as many others."""

    def damage(model):
        content = (model / WEIGHTS).read_bytes()
        assert old in content
        (model / WEIGHTS).write_bytes(content.replace(old, new + b" " * (len(old) - len(new)), 1))

    return damage


def header_of(text):
    return len(text).to_bytes(8, "little") + text.encode()


def append(name, content):
    return lambda model: (model / name).write_bytes((model / name).read_bytes() + content)


def make_directory(name):
    return lambda model: (model / name).mkdir()


def make_pipe(name):
    return lambda model: os.mkfifo(model / name)


def copy_weights(name):
    return lambda model: shutil.copy(model / WEIGHTS, model / name)


def index_more(tensor, file):
    def damage(model):
        values = json.loads((model / INDEX).read_text())
        values["weight_map"][tensor] = file
        (model / INDEX).write_text(json.dumps(values))

    return damage


def drop_end_tokens(model):
    for name in ("config.json", "generation_config.json"):
        change_json(name, **ENDS)(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    # The small tokenizer's end-of-turn token is known by its name.
    text = (model / "tokenizer.json").read_text().replace("<|end|>", "<|close|>")
    (model / "tokenizer.json").write_text(text)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|close|>"))


PART, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
INPUT_NORM = "model.layers.0.input_layernorm.weight"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

CASES = {
    "no config.json": (remove("config.json"), ["config.json"]),
    "config.json is not JSON": (write("config.json", b"{"), ["config.json", "not JSON"]),
    "config.json is a directory": (
        all_of(remove("config.json"), make_directory("config.json")),
        ["config.json cannot be read: Is a directory"],
    ),
    "generation_config.json is a directory": (
        all_of(remove("generation_config.json"), make_directory("generation_config.json")),
        ["generation_config.json cannot be read"],
    ),
    "config.json is a list": (write("config.json", b"[]"), ["config.json", "not a JSON object"]),
    "unknown architecture": (
        change_json("config.json", architectures=["MixtralForCausalLM"]),
        ["MixtralForCausalLM", "LlamaForCausalLM", "Olmo2ForCausalLM"],
    ),
    "unknown RoPE": (
        change_json("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ["config.json", "'yarn'", "llama3"],
    ),
    "a field that is not implemented": (change_json("config.json", mlp_bias=True), ["mlp_bias=True"]),
    "quantized": (change_json("config.json", quantization_config={"bits": 4}), ["quantization_config"]),
    "a missing field": (change_json("config.json", hidden_size="DELETE"), ["hidden_size"]),
    "a field of the wrong type": (change_json("config.json", vocab_size="big"), ["vocab_size='big'"]),
    "another width": (change_json("config.json", hidden_size=40), ["(128, 32)", "(128, 40)", WEIGHTS]),
    "more layers than tensors": (change_json("config.json", num_hidden_layers=3), [WEIGHTS, "model.layers.2."]),
    "fewer layers than tensors": (change_json("config.json", num_hidden_layers=1), [WEIGHTS, "model.layers.1."]),
    "untied, without a head": (change_json("config.json", tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "no weights": (remove(WEIGHTS), ["no weights"]),
    "a pickle file only": (move_weights("pytorch_model.bin"), ["pytorch_model.bin", "pickle", "safetensors"]),
    "weights cut short": (truncate(WEIGHTS, 100), [WEIGHTS, "truncated", "model."]),
    "weights cut within the header": (write(WEIGHTS, b"\x40\0\0\0\0\0\0\0{"), [WEIGHTS, "truncated"]),
    "weights are empty": (write(WEIGHTS, b""), [WEIGHTS, "truncated"]),
    "weights are something else": (write(WEIGHTS, b"\x08\0\0\0\0\0\0\0PK\3\4abcd"), [WEIGHTS, "not a safetensors"]),
    "weights are a directory": (all_of(remove(WEIGHTS), make_directory(WEIGHTS)), [WEIGHTS]),
    "a pipe instead of weights": (all_of(remove(WEIGHTS), make_pipe(WEIGHTS)), [WEIGHTS, "truncated"]),
    "header with a tensor twice": (
        change_bytes(b'"model.layers.1.mlp.up_proj.weight"', b'"model.layers.0.mlp.up_proj.weight"'),
        [WEIGHTS, "not JSON", "model.layers.0.mlp.up_proj.weight", "twice"],
    ),
    "header with numbers that are none": (change_bytes(b'"shape":[32]', b'"shape":[NaN]'), [WEIGHTS, "NaN"]),
    "header nested too deeply": (write(WEIGHTS, header_of("[" * 100_000)), [WEIGHTS, "nested too deeply"]),
    "header that is a list": (write(WEIGHTS, header_of("[]")), [WEIGHTS, "not a JSON object"]),
    **{
        f"header entry with {what}": (
            change_header(lambda h, f=fields: h[NORM].update(f)),
            [WEIGHTS, NORM, "malformed"],
        )
        for what, fields in {
            "offsets as texts": {"data_offsets": ["0", "128"]},
            "offsets as fractions": {"data_offsets": [0.0, 128.0]},
            "offsets before the data": {"data_offsets": [-128, 0]},
            "offsets the wrong way round": {"data_offsets": [128, 0]},
            "one offset": {"data_offsets": [0]},
            "offsets as one text": {"data_offsets": "01"},
            "no list of offsets": {"data_offsets": None},
            "a shape as text": {"shape": "32"},
            "a shape of texts": {"shape": ["32"]},
            "a shape of truth": {"shape": [True]},
            "a negative shape": {"shape": [-4, -8]},
            "a nested shape": {"shape": [[32]]},
            "a million dimensions": {"shape": [1] * 1_000_000},
            "a number as dtype": {"dtype": 32},
            "no dtype": {"dtype": None},
        }.items()
    },
    "header entry with an infinite shape": (
        change_header(lambda h: h[NORM].update(shape=[1e400])),
        [WEIGHTS, "1e400 is beyond the numbers"],
    ),
    "header entry that is a list": (change_header(lambda h: h.update({NORM: [1, 2]})), [WEIGHTS, NORM, "malformed"]),
    "header entry beyond all numbers": (
        change_header(lambda h: h[NORM].update(shape=[2**62] * 8)),
        [WEIGHTS, NORM, "bytes"],
    ),
    "tensors that overlap": (
        change_header(lambda h: h[NORM].update(data_offsets=[offset - 4 for offset in h[NORM]["data_offsets"]])),
        [WEIGHTS, "damaged", "overlaps"],
    ),
    "bytes between tensors": (
        change_header(lambda h: h.pop(INPUT_NORM)),
        [WEIGHTS, "damaged", "128 bytes between"],
    ),
    "bytes after all tensors": (append(WEIGHTS, b"0123456789"), [WEIGHTS, "10 bytes after", "no tensor"]),
    "a name that a terminal would act on": (
        change_header(lambda h: h.update({"\x1b[2Jx\n" * 1000: h.pop(NORM) | {"shape": "32"}})),
        [WEIGHTS, r"\x1b[2Jx\n", "malformed"],
    ),
    "a pointer of Git LFS": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), [WEIGHTS]),
    "header entry without a shape": (change_header(lambda h: h[NORM].pop("shape")), [WEIGHTS, NORM, "malformed"]),
    "header entry of another size": (
        change_header(lambda h: h[NORM].update(shape=[31])),
        [WEIGHTS, NORM, "bytes"],
    ),
    "a missing tensor": (change_tensors(lambda t: t.pop(UP)), [WEIGHTS, UP, "missing"]),
    "a misnamed tensor": (change_tensors(lambda t: t.update({UP + "s": t.pop(UP)})), [WEIGHTS, UP, "missing"]),
    "an extra tensor": (
        change_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})),
        [WEIGHTS, "model.layers.0.self_attn.q_proj.bias", "LlamaForCausalLM"],
    ),
    "a tensor of another shape": (change_tensors(lambda t: t.update({NORM: t[NORM][:5]})), [NORM, "(5,)", "(32,)"]),
    "a tensor of integers": (
        change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        [NORM, "I8", "BF16"],
    ),
    "a tensor of float64": (change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float64)})), [NORM, "F64"]),
    "weights under another name": (move_weights("weights.safetensors"), ["no weights", "weights.safetensors"]),
    "a head that differs from the embeddings that it is tied to": (
        change_tensors(lambda t: t.update({HEAD: t[EMBEDDINGS] + np.float32(1e-3)})),
        [WEIGHTS, HEAD, "tie_word_embeddings"],
    ),
    "a tied head of another shape": (
        change_tensors(lambda t: t.update({HEAD: t[EMBEDDINGS][:5]})),
        [WEIGHTS, HEAD, "(5, 32)", "(128, 32)"],
    ),
    "a number that is none": (change_tensors(lambda t: t[UP].__setitem__((3, 4), np.nan)), [WEIGHTS, UP, "NaN"]),
    "embeddings of zeros": (
        change_tensors(lambda t: t[EMBEDDINGS].fill(0)),
        [WEIGHTS, EMBEDDINGS, "zeros only", "not complete"],
    ),
    "an infinite number": (change_tensors(lambda t: t[NORM].__setitem__(3, -np.inf)), [WEIGHTS, NORM, "infinity"]),
    "an index nested too deeply": (all_of(write(INDEX, b"[" * 100_000), remove(WEIGHTS)), [INDEX, "nested"]),
    "an index with numbers for files": (
        all_of(write(INDEX, b'{"weight_map": {"a": 3}}'), remove(WEIGHTS)),
        [INDEX, "weight_map"],
    ),
    "an index of a file elsewhere": (
        all_of(write(INDEX, b'{"weight_map": {"a": "../model.safetensors"}}'), remove(WEIGHTS)),
        [INDEX, "../model.safetensors", "same directory"],
    ),
    "a part of another model": (copy_weights(PART), [PART, "beside model.safetensors", "only one"]),
    "a part that the index leaves out": (
        all_of(index_of(SECOND), copy_weights(PART), move_weights(SECOND)),
        [PART, "is not in model.safetensors.index.json", "only one"],
    ),
    "weights beside the parts of an index": (
        all_of(copy_weights(PART), index_of(PART)),
        [f"/{WEIGHTS} is not in model.safetensors.index.json", "only one"],
    ),
    "a tensor in two files": (
        all_of(copy_weights(SECOND), index_of(PART), move_weights(PART), index_more("x", SECOND)),
        [SECOND, PART, "only one can be meant"],
    ),
    "an index naming a missing file": (all_of(index_of(PART), remove(WEIGHTS)), [PART, "missing"]),
    "an index without weight_map": (all_of(write(INDEX, b"{}"), remove(WEIGHTS)), [INDEX, "weight_map"]),
    "an index that leaves a tensor out": (
        all_of(index_of(PART, missing=[NORM]), move_weights(PART)),
        [INDEX, NORM, "missing"],
    ),
    "an index naming a tensor that the file lacks": (
        all_of(change_tensors(lambda t: t.pop(NORM)), index_of(PART, extra=[NORM]), move_weights(PART)),
        [PART, NORM, "missing"],
    ),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer.json", "tokenizer.model"]),
    "a damaged tokenizer": (truncate("tokenizer.json", 50), ["tokenizer.json"]),
    "a damaged tokenizer_config.json": (write("tokenizer_config.json", b"[1]"), ["tokenizer_config.json"]),
    "vocabulary smaller than the tokenizer": (
        all_of(
            change_json("config.json", vocab_size=90),
            change_tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:90]})),
        ),
        ["vocab_size=90", "tokenizer has"],
    ),
    "an end token outside the vocabulary": (change_json("config.json", eos_token_id=500), ["500", "128"]),
    "no end-of-sequence token": (drop_end_tokens, ["no end-of-sequence token"]),
    "a chat template with an error": (
        write("chat_template.jinja", b"{% for m in messages %}"),
        ["chat_template.jinja", "Jinja"],
    ),
    "a chat template that rewrites the prompt": (
        write(
            "chat_template.jinja",
            b"{% if add_generation_prompt %}ask: {% endif %}{{ messages[0]['content'] }}<|assistant|>"
            b"{% if messages[1:] %}{{ messages[-1]['content'] }}<|end|>{% endif %}",
        ),
        ["chat template", "ask: "],
    ),
}


def load(model):
    opened = open_model(model)
    opened.check_chat()
    opened.load(mesh=mesh_of(), rules=TRAIN_RULES, dtype=np.float32)


@pytest.mark.parametrize("kind", CASES)
def test_bad_checkpoint_is_one_line_and_is_left_as_it_was(kind, small_checkpoint, tmp_path):
    damage, words = CASES[kind]
    model = shutil.copytree(small_checkpoint, tmp_path / "model")
    damage(model)
    before = sorted(os.walk(tmp_path))
    with pytest.raises(UserError) as caught:
        load(model)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    for word in words:
        assert word in message
    assert sorted(os.walk(tmp_path)) == before


@pytest.mark.parametrize("command", [train, generate], ids=["train", "generate"])
@pytest.mark.parametrize("kind", ["a missing tensor", "weights cut short", "no end-of-sequence token"])
def test_commands_refuse_bad_checkpoint_and_write_nothing(
    command, kind, small_checkpoint, tmp_path, monkeypatch, capsys
):
    damage, words = CASES[kind]
    model = shutil.copytree(small_checkpoint, tmp_path / "model")
    damage(model)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    arguments = {
        train: ["--config=tiny", f"--workdir={tmp_path}/run", f"--model.path={model}"],
        generate: [f"--model={model}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"],
    }[command]
    before = sorted(os.walk(tmp_path))
    monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
    assert run_command(command.main, command.__name__) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert sorted(os.walk(tmp_path)) == before


def test_undamaged_checkpoint_is_accepted(small_checkpoint):
    model = open_model(small_checkpoint)
    model.check_chat()
    assert set(model.tokenizer.eos_ids) == {2, 6}
