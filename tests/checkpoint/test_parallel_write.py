"""Each process writes its own files of a model, and all together what one process writes alone."""

import hashlib
import json
import time
from pathlib import Path

import parity
import pytest
from test_distributed import Group, host, small_program

from isheep_jax.checkpoint import hf_save
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT

# Writes the Llama fixture in several files, from eight devices of all processes.
WRITE = """
import json, sys, time

sys.path.insert(0, "tests/support")
import parity
from isheep_jax.checkpoint import file_streams, hf_save
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.sharding import TRAIN_RULES, make_mesh
from isheep_jax.config import MeshConfig
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT

hf_save.SHARD_BYTES = 4_000
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=-1))
architecture, params = parity.load(parity.FIXTURES / "llama", mesh=mesh, rules=TRAIN_RULES)
tokenizer = Tokenizer.load(CHECKPOINT)
plain = file_streams.write_file

def noted(path, *arguments):
    # In one piece: several threads write.
    sys.stdout.write(f"writes {{path.name}}\\n")
    sys.stdout.flush()
    if index == {stuck}:
        time.sleep(1000)
    return plain(path, *arguments)

file_streams.write_file = noted
digests = hf_save.save_checkpoint({directory!r}, params, architecture, tokenizer)
# What is made of files, as a model of its base and an adapter is.
file_streams.write_file, hf_save.SHARD_BYTES = plain, 200_000
open_model(CHECKPOINT).save({directory!r} + "-of-files", None)
print("digests", json.dumps(digests), flush=True)
"""


def write(directory: Path, output: Path, count: int, stuck: int | None = None) -> Group:
    output.mkdir()
    return small_program(output, WRITE.format(directory=str(directory), stuck=stuck), count)


def written_by(group: Group, index: int) -> list[str]:
    return [line.split()[1] for line in group.text(index, "out").splitlines() if line.startswith("writes ")]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_files_are_dealt_to_processes_and_their_bytes_do_not_depend_on_how_many(tmp_path, monkeypatch, count):
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 4_000)
    architecture, params = parity.load(parity.FIXTURES / "llama")
    digests = hf_save.save_checkpoint(tmp_path / "one", params, architecture, Tokenizer.load(CHECKPOINT))
    with write(tmp_path / "model", tmp_path / "run", count) as group:
        assert group.codes(100) == [0] * count, group.text(0, "err")
        shares = [written_by(group, index) for index in range(count)]
        (line,) = (x for x in group.text(0, "out").splitlines() if x.startswith("digests "))
    assert sorted(name for share in shares for name in share) == sorted(digests)
    assert min(map(len, shares)) >= len(digests) // count > 0
    one, all_together = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "model"))
    assert all_together == one
    monkeypatch.setattr(hf_save, "SHARD_BYTES", 200_000)
    open_model(CHECKPOINT).save(tmp_path / "one-of-files", None)
    assert len(list((tmp_path / "one-of-files").glob("*.safetensors"))) > count
    for path in (tmp_path / "one-of-files").iterdir():
        assert (tmp_path / "model-of-files" / path.name).read_bytes() == path.read_bytes(), path.name
    assert digests == json.loads(line.removeprefix("digests "))
    assert digests == {name: hashlib.sha256(one[name]).hexdigest() for name in digests}


@pytest.mark.chaos
@pytest.mark.parametrize("lost", [0, 1])
def test_process_that_is_killed_while_it_writes_ends_all_and_leaves_no_model(tmp_path, lost):
    directory = tmp_path / "model"
    with write(directory, tmp_path / "first", 2, stuck=lost) as group:
        group.wait_for(lost, "writes")
        time.sleep(1)
        group.processes[lost].kill()
        codes = group.codes(60)
        assert codes[lost] == -9
        assert codes[1 - lost] == 1
        (line,) = group.errors(1 - lost)
        assert line.startswith(f"error: {host(lost)}")
    assert not directory.exists()
    with write(directory, tmp_path / "second", 2) as group:
        assert group.codes(100) == [0, 0]
    assert not directory.with_name("model.partial").exists()
    assert (directory / "config.json").exists()
