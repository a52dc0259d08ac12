"""The export command: what it copies, what its card says, and that it leaves a whole directory or none."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from isheep_jax.cli.errors import run_command
from isheep_jax.errors import UserError
from isheep_jax.export import COMMAND, main
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "name": "small",
    "iterations": 3,
    "seed": 4,
    "model": {"path": "org/base@v2"},
    "sft": {"method": "lora", "start": "base", "lora_rank": 8, "lora_alpha": 16.0},
}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(run: Path, finished: int = 2, **sft) -> Path:
    """A run directory whose last iteration is in the middle of its fine-tuning."""
    settings = {**SETTINGS, "sft": {**SETTINGS["sft"], **sft}}
    write(run / "config.json", settings)
    write(run / "environment.json", {"python": "3.11.7", "packages": {"jax": "0.10.2"}})
    for number in range(finished + 2):
        place = run / f"iteration_{number}"
        if number <= finished:
            result = {"accuracy": 0.25 * number, "stderr": 0.01, "count": 64, "examples": []}
            write(place / "evaluation.json", {"bench": result})
        if number:
            for i, stage in enumerate(("instructions", "responses", "selected")):
                write(place / stage / "DONE", {"counts": {"records": 999, "kept": 100 * number + i}})
            kinds = ["model", "adapter"] if settings["sft"]["method"] == "lora" else ["model"]
            for kind in kinds:
                (place / kind).mkdir()
                (place / kind / "weights.safetensors").write_bytes(f"{kind} {number}".encode() * 1000)
                (place / kind / "config.json").write_text("{}")
                (place / kind / "README.md").write_text("the card of the loop")
                if kind == "adapter":
                    config = {"r": 8, "base_model_name_or_path": "org/base"}
                    (place / kind / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
                for file in CHECKPOINT.glob("tokenizer*"):
                    shutil.copy(file, place / kind)
            if number <= finished:
                write(place / "fine_tune.json", {"metrics": {}})
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "README.md"}


def front_matter(directory: Path) -> dict:
    _, matter, _ = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter)


def test_newest_finished_iteration_is_copied_byte_by_byte(run, tmp_path, capsys):
    main([str(run), str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(run / "iteration_2" / "model")
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: the model of iteration 2 of {run}")
    assert not (tmp_path / "out.partial").exists()


def test_earlier_iteration_and_named_settings(run, tmp_path):
    main([f"--output={tmp_path}/out", "--iteration=1", "--run", str(run)])
    assert contents(tmp_path / "out") == contents(run / "iteration_1" / "model")
    assert "iteration 1" in (tmp_path / "out" / "README.md").read_text()


def test_adapter_is_copied_with_card_of_its_own(run, tmp_path):
    main([str(run), "--adapter", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(run / "iteration_2" / "adapter")
    matter = front_matter(tmp_path / "out")
    assert matter["library_name"] == "peft"
    assert matter["base_model"] == "org/base"
    assert matter["base_model_relation"] == "adapter"
    assert "a LoRA adapter of rank 8 (alpha 16) for the base model" in (tmp_path / "out" / "README.md").read_text()


def test_adapter_of_local_base_says_that_its_path_must_be_set(run, tmp_path, capsys):
    config = run / "iteration_2" / "adapter" / "adapter_config.json"
    for number, (base, is_path) in enumerate(
        {"/runs/a/iteration_1/model": True, "gs://b/m": True, "org/base": False}.items()
    ):
        write(config, {"base_model_name_or_path": base})
        out = tmp_path / f"out_{number}"
        main([str(run), str(out), "--adapter"])
        card = (out / "README.md").read_text()
        assert ("set it to where that model is" in card) == is_path
        note = capsys.readouterr().out.splitlines()[1:]
        assert len(note) == is_path
        if is_path:
            assert base in note[0]
            assert base in card


def test_adapter_of_the_runs_own_model_has_its_full_path_wherever_the_run_was_moved(run, tmp_path, capsys):
    config = run / "iteration_2" / "adapter" / "adapter_config.json"
    write(config, {"r": 8, "base_model_name_or_path": "iteration_1/model"})
    moved = run.rename(tmp_path / "moved")
    main([str(moved), str(tmp_path / "out"), "--adapter"])
    exported = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert exported == {"r": 8, "base_model_name_or_path": f"{moved.resolve()}/iteration_1/model"}
    assert f"{moved.resolve()}/iteration_1/model" in capsys.readouterr().out.splitlines()[1]


def test_card_tells_base_chain_counts_digest_versions_and_evaluation(run, tmp_path):
    main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(tmp_path / "out") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "tags": ["self-alignment", "synthetic-data", "jax"],
    }
    assert "| base model | org/base@v2 |" in card
    assert "| 1 | 100 | 101 | 102 |\n| 2 | 200 | 201 | 202 |\n\n" in card
    assert hashlib.sha256((run / "config.json").read_bytes()).hexdigest() in card
    assert "python 3.11.7, jax 0.10.2" in card
    assert "| bench (accuracy) | 0.000 ± 0.010 of 64 prompts | 0.500 ± 0.010 of 64 prompts |" in card
    assert all(len(line) <= 120 or line.startswith("|") for line in card.splitlines())


def test_model_that_is_not_measured_yet_says_so(run, tmp_path):
    (run / "iteration_2" / "evaluation.json").unlink()
    main([str(run), str(tmp_path / "out")])
    assert (
        "| bench (accuracy) | 0.000 ± 0.010 of 64 prompts | not measured |"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_run_without_tasks_says_so(run, tmp_path):
    for number in range(3):
        write(run / f"iteration_{number}" / "evaluation.json", {})
    main([str(run), str(tmp_path / "out")])
    assert "measured neither the base model nor this one" in (tmp_path / "out" / "README.md").read_text()


def test_chain_names_model_before_it_and_no_base_that_is_not_on_hub(tmp_path):
    run = make_run(tmp_path / "run", start="previous")
    main([str(run), str(tmp_path / "out"), "--adapter"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "for the model of iteration 1" in card
    assert "Training began from the model before, too." in card
    assert "base_model" not in front_matter(tmp_path / "out")
    main([str(run), str(tmp_path / "whole")])
    assert front_matter(tmp_path / "whole")["base_model"] == "org/base"


def test_local_base_model_is_in_table_alone(run, tmp_path):
    write(run / "config.json", {**SETTINGS, "model": {"path": "/data/llama"}})
    main([str(run), str(tmp_path / "out")])
    assert "base_model" not in front_matter(tmp_path / "out")
    assert "| base model | /data/llama |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--run is missing", "python -m isheep_jax.export"]),
        (["{run}"], ["--output is missing"]),
        (["{tmp}", "{tmp}/out"], ["--run", "{tmp} is not a run's directory"]),
        (["/nowhere", "{tmp}/out"], ["--run", "/nowhere"]),
        (["{run}/iteration_1/model", "{tmp}/out"], ["is not a run's directory"]),
        (["{run}", "{tmp}/out", "--iteration=3"], ["--iteration", "3", "is not finished", "finished: 1, 2"]),
        (["{run}", "{tmp}/out", "--iteration=0"], ["--iteration", "the base model"]),
        (["{run}", "{tmp}/out", "--iteration=-2"], ["--iteration", "at least -1"]),
        (["{full}", "{tmp}/out", "--adapter"], ["--adapter", "sft.method=full"]),
        (["{new}", "{tmp}/out"], ["no finished iteration yet"]),
        (["{old}", "{tmp}/out", "--adapter"], ["--adapter", "iteration_2/adapter is missing"]),
        (["{run}", "{run}"], ["--output", "exists"]),
        (["{run}", "{tmp}/a/b"], ["--output", "there is no directory {tmp}/a"]),
        (["{run}", "{tmp}/out", "more"], ["'more' belongs to no setting"]),
        (["{run}", "-x"], ["'-x' belongs to no setting"]),
        (["{run}", "{tmp}/out", "--iterations=2"], ["did you mean --iteration?"]),
        (["{damaged}", "{tmp}/out"], ["{damaged}/config.json"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, arguments, words, monkeypatch, capsys):
    places = {"tmp": tmp_path, "run": run, "full": make_run(tmp_path / "full", method="full")}
    places |= {name: make_run(tmp_path / name) for name in ("old", "damaged")}
    places["new"] = make_run(tmp_path / "new", finished=0)
    shutil.rmtree(places["old"] / "iteration_2" / "adapter")
    (places["damaged"] / "config.json").write_text('{"name": "sm')
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["export", *(a.format(**places) for a in arguments)])
    assert run_command(main, COMMAND.module) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word.format(**places) in line
    assert sorted(tmp_path.rglob("*")) == before


KILL_AT_THE_SECOND_FILE = """
import os, shutil, signal, sys
whole, files = shutil.copyfileobj, []
def copy(source, target, size):
    files.append(target)
    if len(files) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(source, target, size)
shutil.copyfileobj = copy
from isheep_jax.export import main
main(sys.argv[1:])
"""


def test_killed_in_middle_it_leaves_no_output_and_same_command_does_whole(run, tmp_path):
    command = [sys.executable, "-c", KILL_AT_THE_SECOND_FILE, str(run), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()
    main([str(run), str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(run / "iteration_2" / "model")
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main([str(run), str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_one_line_and_leaves_nothing(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match=r"cannot write .*disk/out.partial: No space left on device"):
            main([str(run), f"{disk}/out"])
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


class CloudStorage(MemoryFileSystem):
    """Objects in memory under gs://."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 (the base class's attributes)
    pseudo_dirs: list = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))


def test_output_in_cloud_storage_is_written_there(run, monkeypatch):
    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend._get_filesystem", lambda *_: CloudStorage())
    CloudStorage().mkdir("/bucket")
    main([str(run), "gs://bucket/models/out"])
    output = epath.Path("gs://bucket/models/out")
    assert {p.name: p.read_bytes() for p in output.iterdir() if p.name != "README.md"} == contents(
        run / "iteration_2" / "model"
    )
    assert [p.name for p in output.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"gs://bucket/models/out exists"):
        main([str(run), "gs://bucket/models/out"])


def test_help_shows_words_without_names():
    result = subprocess.run(
        [sys.executable, "-m", COMMAND.module, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "python -m isheep_jax.export RUN OUTPUT" in result.stdout
    assert "RUN (--run), OUTPUT (--output)" in result.stdout
    assert "jax" not in result.stderr


def test_card_says_what_user_of_tokenizer_must_know(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "export_note", property(lambda tokenizer: "Load tokenizer.model by itself."))
    main([str(run), str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text().endswith("\nLoad tokenizer.model by itself.\n")
