"""A model of the hub is copied once, whole or not at all, by one process or several."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import COMMIT, HubStandIn
from huggingface_hub import constants
from huggingface_hub.file_download import DryRunFileInfo
from memory_bucket import memory_bucket
from processes import one_device

from isheep_jax import distributed, fetch
from isheep_jax.errors import UserError
from isheep_jax.runtime import hub
from isheep_jax.runtime.locate import locate_model

ROOT = Path(__file__).parent.parent
RANDOM = random.Random(0)
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps({"weight_map": {f"t{i}": s for i, s in enumerate(SHARDS)}}).encode(),
    **{shard: RANDOM.randbytes(1000 + i) for i, shard in enumerate(SHARDS)},
}
OTHERS = {
    "README.md": b"#",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "model.fp16.safetensors": b"twice",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "training_args.bin": b"pickle",
}
GGUF = {"model-q8_0.gguf": RANDOM.randbytes(700), "model-q4_k.gguf": b"GGUF"}


@pytest.fixture
def stand_in(monkeypatch):
    repositories = {
        "org/model": {**MODEL, **OTHERS},
        "org/gguf": {"config.json": b"{}", **GGUF},
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b""},
        "org/broken": {"config.json": b"{}", "model.safetensors.index.json": b"[]"},
        "org/cut": {name: data for name, data in MODEL.items() if name != SHARDS[1]},
        "org/bare": {"README.md": b""},
        "org/gated": MODEL,
    }
    with HubStandIn(repositories).serving() as served:
        served.gated = {"org/gated"}
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(fetch, "_BLOCK", 300)
        yield served


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "fetch.json"}


def copied(stand_in, *arguments) -> list[str]:
    """Runs the command, and returns the names of the files that the hub was asked for."""
    stand_in.asked.clear()
    fetch.main([str(argument) for argument in arguments])
    # The index is read beforehand, to know which files there must be.
    return sorted(stand_in.asked - Counter(["model.safetensors.index.json"]))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_files_of_the_model_are_copied_once_and_no_others(stand_in, tmp_path, monkeypatch, place, capsys):
    output = tmp_path / "model" if place == "disk" else memory_bucket(monkeypatch) / "copy"
    copied(stand_in, "org/model", output)
    assert files_of(output) == MODEL
    assert f"{output}: whole; --model.path={output} reads it" in capsys.readouterr().out
    assert str(locate_model(str(output))) == str(output)
    assert copied(stand_in, "org/model", output) == []
    assert files_of(output) == MODEL


def test_model_without_an_index_and_revision_after_at(stand_in, tmp_path):
    stand_in.repositories["org/small"] = {"config.json": b"{}", "model.safetensors": b"weights", **OTHERS}
    copied(stand_in, f"org/small@{COMMIT}", tmp_path / "out")
    assert files_of(tmp_path / "out") == {"config.json": b"{}", "model.safetensors": b"weights"}


def test_gguf_file_is_copied_by_its_name(stand_in, tmp_path, capsys):
    copied(stand_in, "org/gguf", tmp_path / "out", "--file=model-q8_0.gguf")
    assert files_of(tmp_path / "out") == {"model-q8_0.gguf": GGUF["model-q8_0.gguf"]}
    assert f"--model.path={tmp_path / 'out' / 'model-q8_0.gguf'} reads it" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_what_goes_wrong_leaves_no_whole_model_and_is_mended_by_the_same_command(
    stand_in, tmp_path, monkeypatch, place
):
    output = tmp_path / "model" if place == "disk" else memory_bucket(monkeypatch) / "copy"
    stand_in.trouble = lambda name, _: RANDOM.randbytes(1001) if name == SHARDS[1] else None
    with pytest.raises(UserError, match=rf"{SHARDS[1]}: the sha256 of what came is not the hub's; try again"):
        fetch.main(["org/model", str(output)])
    there = files_of(output)
    assert "config.json" not in there
    assert SHARDS[1] not in there
    assert all(MODEL[name] == data for name, data in there.items())
    stand_in.trouble = lambda name, _: None
    again = copied(stand_in, "org/model", output)
    assert set(again) == MODEL.keys() - there.keys()
    assert files_of(output) == MODEL


def test_git_files_are_compared_too(stand_in, tmp_path):
    stand_in.trouble = lambda name, _: b"{{ messagez }}" if name == "chat_template.jinja" else None
    with pytest.raises(UserError, match=r"chat_template.jinja: the git of what came is not the hub's"):
        fetch.main(["org/model", str(tmp_path / "out")])


def test_errors_that_pass_are_tried_again(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    stand_in.trouble = lambda name, count: 503 if name == SHARDS[0] and count == 1 else None
    copied(stand_in, "org/model", tmp_path / "out")
    assert files_of(tmp_path / "out") == MODEL


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["org/nosuch", "{out}"], "--model: org/nosuch is no model on the Hugging Face hub; give org/name"),
        (["org/gated", "{out}"], "--model: org/gated is gated: accept its terms"),
        (["/some/where", "{out}"], "--model: /some/where is no name on the Hugging Face hub"),
        (["org/bare", "{out}"], "--model: org/bare has no config.json: it is no model in Hugging Face format"),
        (["org/pickled", "{out}"], "--model: org/pickled has no weights in safetensors"),
        (["org/broken", "{out}"], "org/broken/model.safetensors.index.json is damaged"),
        (["org/cut", "{out}"], f"--model: org/cut lacks {SHARDS[1]}, which its index names"),
        (
            ["org/gguf", "{out}"],
            "org/gguf has no weights in safetensors; --file copies one of its GGUF files: model-",
        ),
        (["org/gguf", "{out}", "--file=x.gguf"], "--file: org/gguf has no GGUF file x.gguf; --file copies one of"),
        (["org/model", "{file}"], "--output: {file} is a file"),
        (["org/model", "{used}"], "--output: {used} holds other files, such as thesis; name a directory that does not"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(stand_in, tmp_path, arguments, words):
    places = {"out": tmp_path / "out", "file": tmp_path / "file", "used": tmp_path / "used"}
    places["file"].write_text("")
    places["used"].mkdir()
    (places["used"] / "thesis").write_text("")
    with pytest.raises(UserError) as caught:
        fetch.main([argument.format(**places) for argument in arguments])
    assert words.format(**places) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not places["out"].exists()
    assert [path.name for path in places["used"].iterdir()] == ["thesis"]


def test_directory_of_another_model_or_revision_is_refused(stand_in, tmp_path):
    copied(stand_in, "org/gguf", tmp_path / "out", "--file=model-q4_k.gguf")
    with pytest.raises(UserError, match="holds org/gguf at c0ffeec0ffee, and org/model is at c0ffeec0ffee now"):
        fetch.main(["org/model", str(tmp_path / "out")])
    copied(stand_in, "org/model", tmp_path / "other")
    stand_in.commit = "d" * 40
    with pytest.raises(UserError, match="holds org/model at c0ffeec0ffee, and org/model is at dddddddddddd now"):
        fetch.main(["org/model", str(tmp_path / "other")])


def test_shares_are_of_about_the_same_size_and_together_all():
    files = [hub.HubFile(f"{i}", 1000 + i, "") for i in range(30)] + [hub.HubFile("small", 5, "")]
    shares = fetch._shares(files, 7)
    assert sorted(file.name for share in shares for file in share) == sorted(file.name for file in files)
    sizes = [sum(file.size for file in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1100


def test_large_model_is_not_downloaded_by_each_of_several_processes(stand_in, monkeypatch):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "process_count", lambda: 32)
    described = [DryRunFileInfo("c", 141_000_000_000, "x", "x", False, True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: described)
    with pytest.raises(UserError, match=r"every one of 32 processes would download org/large, 141 GB, to its own disk"):
        locate_model("org/large")


def processes(count: int, stand_in: HubStandIn, *arguments: str) -> list[subprocess.Popen]:
    """Starts the command in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = one_device(HF_ENDPOINT=stand_in.url, HF_HUB_DISABLE_TELEMETRY="1", JAX_PLATFORMS="cpu")
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-m", "isheep_jax.fetch", *arguments]
    return [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def test_several_processes_copy_each_file_once(stand_in, tmp_path):
    group = processes(2, stand_in, "org/model", str(tmp_path / "out"))
    ends = [process.communicate(timeout=120) for process in group]
    assert [process.returncode for process in group] == [0, 0], ends
    assert files_of(tmp_path / "out") == MODEL
    assert stand_in.asked == dict.fromkeys(MODEL, 1) | {"model.safetensors.index.json": 2}
    assert ends[0][0].splitlines()[0].startswith("org/model at c0ffeec0ffee: 8 files")
    assert ends[1][0] == ""


def test_signal_ends_it_in_time_and_the_same_command_goes_on(stand_in, tmp_path):
    blocked = []

    def trouble(name, count):
        if name == SHARDS[2] and len(blocked) < 1:
            blocked.append(name)
            time.sleep(3)

    stand_in.trouble = trouble
    (process,) = processes(1, stand_in, "org/model", str(tmp_path / "out"))
    deadline = time.monotonic() + 60
    while not blocked and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    (line,) = errors.splitlines()
    assert line.startswith(
        "stopped by SIGTERM; the same command goes on from here: python -m isheep_jax.fetch org/model"
    )
    there = files_of(tmp_path / "out")
    assert not {SHARDS[2], "config.json"} & there.keys()
    (process,) = processes(1, stand_in, "org/model", str(tmp_path / "out"))
    assert process.wait(60) == 0
    assert files_of(tmp_path / "out") == MODEL
