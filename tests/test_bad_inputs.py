"""What users get wrong, over all commands: one line that names the setting or file, exit code 2, nothing left."""

import importlib
import struct

import pytest

from isheep_jax.cli.errors import run_command

# A batch that the eight devices of the tests divide.
TINY = ["train", "--config=tiny", "--sft.batch_size=8"]
TRAIN = [*TINY, "--workdir={tmp}/run"]
GENERATE = ["generate", "--model=tiny"]
EVALUATE = ["evaluate", "--model=tiny", "--output={tmp}/evaluated"]
JUDGE = ["judge", "--config=tiny"]
STUDY = ["study", "--config=tiny", "--workdir={tmp}/study"]

FILES = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n",
    "binary.jsonl": b"\xff\xfe\x00\x01",
    "torn.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
    "number.jsonl": b'{"prompt": 5, "instruction": 5}\n',
    "list.jsonl": b'{"prompt": ["a"]}\n',
    "other.jsonl": b'{"text": "a"}\n',
    "twice.jsonl": b'{"prompt": "a", "prompt": "b"}\n',
    "surrogate.jsonl": b'{"prompt": "\\ud83d", "instruction": "\\ud83d"}\n',
    "nan.jsonl": b'{"prompt": NaN}\n',
    "deep.jsonl": b"[" * 100_000,
    "array.json": b"[1, 2]",
    "good.jsonl": b'{"prompt": "Swap cat and red."}\n',
    "one_seed.jsonl": b'{"instruction": "Swap cat and red."}\n',
    "file": b"x",
    "plan.json": b'{"programs": {"decode": 5}, "settings": []}',
    "thesis/thesis.tex": b"\\documentclass{article}",
    "bert/config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}',
    "torn_config/config.json": b"{",
    "array_config/config.json": b"[]",
    "model.gguf": b"GGUF" + struct.pack("<I", 3) + b"\xff" * 16,
    "prompts/quality.jinja": b"{{ ",
    "damaged/evaluation.json": b'{"tiny": []}',
    "empty_directory/.keep": b"",
}


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory with the files above, in which the command runs."""
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The words of a command line, and what its error must say.
CASES = [
    # Command lines.
    (["train"], "--config is missing"),
    (["train", "--config=tinny"], "did you mean 'tiny'"),
    (["train", "--config="], "--config needs a name"),
    (["train", "--config=../configs/tiny"], "--config: there is no config"),
    ([*TRAIN, "--nosuch=1"], "--nosuch: there is no such setting"),
    ([*TRAIN, "--learning_rate=1"], "did you mean --sft.learning_rate"),
    ([*TRAIN, "stray"], "'stray' belongs to no setting"),
    ([*TRAIN, "--preset=nosuch"], "--preset: there is no preset 'nosuch'"),
    ([*TRAIN, "--name=a/b"], "--name: 'a/b' is no name"),
    ([*TRAIN, "--name=\x1b[31m"], r"--name: '\x1b[31m' is no name"),
    ([*TRAIN, "--name="], "--name: '' is no name"),
    ([*TRAIN, "--prompts=\udcff"], "--prompts: this is not text in utf-8"),
    # Values.
    ([*TRAIN, "--iterations=1.5"], "--iterations: '1.5' is not a whole number"),
    ([*TRAIN, "--iterations=0"], "--iterations: 0 is out of range"),
    ([*TRAIN, "--synthesize.instructions=1e12"], "--synthesize.instructions: '1e12' is not a whole number"),
    ([*TRAIN, "--iterations=99999999999999999999"], "--iterations"),
    ([*TRAIN, "--synthesize.instructions=1000000000000"], "--synthesize.instructions"),
    ([*TRAIN, "--respond.samples=1000000000"], "--respond.samples"),
    ([*TRAIN, "--sft.epochs=1000000000000"], "--sft.epochs"),
    ([*TRAIN, "--decode.slots=100000000"], "--decode.slots"),
    ([*TRAIN, "--sft.learning_rate=nan"], "--sft.learning_rate: nan is out of range"),
    ([*TRAIN, "--sft.learning_rate=1e300"], "--sft.learning_rate: 1e+300 is out of range"),
    ([*TRAIN, "--assess.judge=localhost:1/v1"], "localhost:1/v1 is no URL without http:// or https:// in front of it"),
    ([*TRAIN, "--sft.learning_rate=inf"], "--sft.learning_rate: inf is out of range"),
    ([*TRAIN, "--sft.method=qlora"], "--sft.method: 'qlora' is not one of lora, full"),
    ([*TRAIN, "--sft.sequence_length=1000000000"], "sft.sequence_length"),
    ([*TRAIN, "--sft.batch_size=0"], "--sft.batch_size: 0 is out of range"),
    ([*TRAIN, "--select.fraction=0"], "--select.fraction: 0.0 is out of range"),
    ([*TRAIN, "--respond.temperature="], "--respond.temperature: the list is empty"),
    ([*TRAIN, "--decode.max_length=1"], "decode.max_length"),
    ([*TRAIN, "--mesh.fsdp=3"], "mesh.fsdp=3"),
    ([*TRAIN, "--mesh.tensor=-1"], "mesh.tensor=-1"),
    ([*TRAIN, "--assess.readings=nosuch"], "--assess.readings"),
    ([*TRAIN, "--assess.judge=http://127.0.0.1:9/v1"], "--assess.read: a server"),
    ([*TRAIN, "--evaluate.tasks=nosuch"], "--evaluate.tasks: there is no task 'nosuch'"),
    # Files of a run.
    ([*TRAIN, "--synthesize.seeds={tmp}/nowhere"], "synthesize.seeds: cannot read {tmp}/nowhere: No such file"),
    ([*TRAIN, "--synthesize.seeds={tmp}/empty_directory"], "synthesize.seeds: cannot read {tmp}/empty_directory"),
    ([*TRAIN, "--synthesize.seeds={tmp}/empty.jsonl"], "synthesize.seeds: {tmp}/empty.jsonl is empty"),
    ([*TRAIN, "--synthesize.seeds={tmp}/binary.jsonl"], "synthesize.seeds: {tmp}/binary.jsonl is not UTF-8"),
    ([*TRAIN, "--synthesize.seeds={tmp}/number.jsonl"], "{tmp}/number.jsonl, line 1: 'instruction' should be text"),
    ([*TRAIN, "--synthesize.seeds={tmp}/surrogate.jsonl"], "{tmp}/surrogate.jsonl, line 1: half of a surrogate pair"),
    ([*TRAIN, "--synthesize.seeds={tmp}/array.json"], "{tmp}/array.json, item 1 should be an object"),
    ([*TRAIN, "--synthesize.seeds={tmp}/deep.jsonl"], "{tmp}/deep.jsonl: nested too deeply"),
    ([*TRAIN, "--synthesize.seeds={tmp}/one_seed.jsonl"], "{tmp}/one_seed.jsonl has only 1"),
    ([*TRAIN, "--prompts={tmp}/nowhere"], "prompts: there is no directory {tmp}/nowhere"),
    ([*TRAIN, "--prompts={tmp}/prompts"], "prompts: {tmp}/prompts"),
    ([*TRAIN, "--guard.pairs={tmp}/number.jsonl"], "guard.pairs: {tmp}/number.jsonl, line 1"),
    ([*TRAIN, "--guard.pairs={tmp}/nowhere"], "guard.pairs: cannot read {tmp}/nowhere"),
    ([*TINY, "--workdir={tmp}/thesis"], "workdir: {tmp}/thesis holds something else (thesis.tex)"),
    ([*TINY, "--workdir={tmp}/file"], "workdir: {tmp}/file is a file"),
    ([*TINY, "--workdir=/proc/run"], "workdir: cannot write in /proc/run"),
    ([*TINY, "--workdir=nosuch://a/b"], "--workdir: nosuch:// is not known"),
    ([*TRAIN, "--synthesize.seeds=nosuch://a/b"], "--synthesize.seeds: nosuch:// is not known"),
    ([*TRAIN, "--model.path=nosuch://u:key@a/b"], "--model.path: nosuch:// is not known"),
    (["evaluate", "--model=nosuch://a/b", "--tasks=tiny"], "--model: nosuch:// is not known"),
    (["export", "nosuch://a/b", "{tmp}/out"], "--run: nosuch:// is not known"),
    (["fetch", "org/name", "file:///a/b"], "--output: file:// is not known"),
    (["plan", "--table", "plan.json", "nosuch://a/b"], "--table: nosuch:// is not known"),
    # Models.
    ([*TRAIN, "--model.path="], "--model.path: it is empty"),
    ([*TRAIN, "--model.path={tmp}/nowhere"], "--model.path: {tmp}/nowhere is no directory"),
    ([*TRAIN, "--model.path={tmp}/empty_directory"], "--model.path: {tmp}/empty_directory is neither a model"),
    ([*TRAIN, "--model.path={tmp}/file"], "--model.path: {tmp}/file is a file"),
    ([*TRAIN, "--model.path={tmp}/bert"], "{tmp}/bert/config.json: architectures=['BertModel'] is not supported"),
    ([*TRAIN, "--model.path={tmp}/torn_config"], "{tmp}/torn_config/config.json: not JSON"),
    ([*TRAIN, "--model.path={tmp}/array_config"], "{tmp}/array_config/config.json is not a JSON object"),
    ([*TRAIN, "--model.path={tmp}/model.gguf"], "{tmp}/model.gguf"),
    ([*TRAIN, "--assess.judge={tmp}/empty_directory"], "--assess.judge: {tmp}/empty_directory is neither"),
    # The other commands.
    (["generate", "--prompt=a"], "--model is missing"),
    (GENERATE, "give either --prompt"),
    ([*GENERATE, "--prompt=a", "--chat"], "give either --prompt"),
    ([*GENERATE, "--prompt", "\udcff"], "--prompt: this is not text in utf-8"),
    ([*GENERATE, "--prompt=a", "--output={tmp}/out.jsonl"], "--output"),
    ([*GENERATE, "--prompt=" + "long " * 10_000], "--prompt: the prompt has 30004 tokens; --max_length=128"),
    ([*GENERATE, "--prompt=a", "--max_tokens=0"], "--max_tokens: 0 is out of range"),
    ([*GENERATE, "--prompt=a", "--temperature=nan"], "--temperature: nan is out of range"),
    ([*GENERATE, "--prompt=a", "--decode_tensor=3"], "--decode_tensor=3"),
    ([*GENERATE, "--input={tmp}/nowhere"], "--input: cannot read {tmp}/nowhere"),
    ([*GENERATE, "--input={tmp}/blank.jsonl"], "--input: {tmp}/blank.jsonl is empty"),
    ([*GENERATE, "--input={tmp}/torn.jsonl"], "--input: {tmp}/torn.jsonl, line 2: not JSON"),
    ([*GENERATE, "--input={tmp}/list.jsonl"], "{tmp}/list.jsonl, line 1: 'prompt' should be text"),
    ([*GENERATE, "--input={tmp}/other.jsonl"], "{tmp}/other.jsonl, line 1: 'prompt' (or 'instruction') is missing"),
    ([*GENERATE, "--input={tmp}/twice.jsonl"], "{tmp}/twice.jsonl, line 1: the name 'prompt' is there twice"),
    ([*GENERATE, "--input={tmp}/surrogate.jsonl"], "{tmp}/surrogate.jsonl, line 1: half of a surrogate pair"),
    ([*GENERATE, "--input={tmp}/nan.jsonl"], "{tmp}/nan.jsonl, line 1: NaN"),
    (
        [*GENERATE, "--input={tmp}/good.jsonl", "--output={tmp}/no/out.jsonl"],
        "--output: there is no directory {tmp}/no",
    ),
    ([*GENERATE, "--input={tmp}/good.jsonl", "--output={tmp}/thesis"], "--output: {tmp}/thesis is a directory"),
    ([*GENERATE, "--input={tmp}/good.jsonl", "--output={tmp}/good.jsonl"], "--output: {tmp}/good.jsonl"),
    ([*EVALUATE], "--tasks is missing"),
    ([*EVALUATE, "--tasks=nosuch"], "--tasks: there is no task 'nosuch'"),
    (["evaluate", "--model={tmp}/nowhere", "--tasks=tiny"], "--model: {tmp}/nowhere is no directory"),
    (["evaluate", "--model=tiny", "--tasks=tiny", "--output={tmp}/file"], "--output: {tmp}/file is a file"),
    (["evaluate", "--compare", "{tmp}/thesis", "{tmp}/thesis"], "{tmp}/thesis has no evaluation.json"),
    (["evaluate", "--compare", "{tmp}/thesis"], "--compare needs two evaluated models, not 1"),
    (
        ["evaluate", "--compare", "{tmp}/damaged", "{tmp}/damaged"],
        "{tmp}/damaged/evaluation.json",
    ),
    (["judge"], "--config is missing"),
    ([*JUDGE, "--guard.pairs={tmp}/empty.jsonl"], "guard.pairs: {tmp}/empty.jsonl is empty"),
    (["export"], "--run is missing"),
    (["fetch"], "--model is missing"),
    (["fetch", "{tmp}/thesis", "{tmp}/out"], "--model: {tmp}/thesis is no name on the Hugging Face hub"),
    (["export", "{tmp}/thesis", "{tmp}/out"], "--run: {tmp}/thesis is not a run's directory"),
    (["plan"], "--config is missing"),
    (["plan", "--table", "{tmp}/plan.json"], "--table: {tmp}/plan.json is not a file that --output wrote"),
    (["plan", "--table", "{tmp}/nowhere"], "--table: cannot read {tmp}/nowhere"),
    (["plan", "--config=tiny", "--output={tmp}/no/plan.json"], "--output: there is no directory {tmp}/no"),
    (["plan", "--config=llama_70b_v4", "--mesh.topology=nosuch"], "mesh.topology"),
    (["benchmark", "nosuch", "--config=tiny"], "--measure: 'nosuch' is not one of decode"),
    ([*STUDY], "--study is missing"),
    ([*STUDY, "--study=nosuch"], "--study: there is no study 'nosuch'"),
    ([*STUDY, "--study=filters", "--seeds="], "--seeds: the list is empty"),
    ([*STUDY, "--study=filters", "--results={tmp}/no/results.json"], "--results: there is no directory {tmp}/no"),
    (["tiny.pretrain"], "--output is missing"),
]


def name(case):
    return " ".join(word[:40] for word in case).encode("ascii", "replace").decode()


@pytest.mark.parametrize(("words", "said"), CASES, ids=[name(words) for words, _ in CASES])
def test_bad_input_is_one_line_and_leaves_nothing(directory, monkeypatch, capsys, words, said):
    command, *arguments = (word.replace("{tmp}", str(directory)) for word in words)
    before = {path: path.is_dir() or path.read_bytes() for path in directory.rglob("*")}
    monkeypatch.setattr("sys.argv", [command, *arguments])

    module = f"isheep_jax.{command}"
    code = run_command(importlib.import_module(module).main, module)

    output = capsys.readouterr()
    assert (code, output.out) == (2, "")
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert said.replace("{tmp}", str(directory)) in line
    assert {path: path.is_dir() or path.read_bytes() for path in directory.rglob("*")} == before
