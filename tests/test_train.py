"""The train command as the user sees it: one line and exit code 2 for bad input, a table at the end, resume."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from processes import one_device
from run_kinds import wait_for

from isheep_jax import generate
from isheep_jax.cli.errors import run_command
from isheep_jax.errors import UserError
from isheep_jax.train import main

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, "-m", "isheep_jax.train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=one_device())


def assert_one_line(result, *words):
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line


def test_bad_input_is_one_line_and_exit_code_2():
    assert_one_line(run("--config=tinny"), "error: --config", "did you mean 'tiny'")


@pytest.mark.slow
def test_wheel_holds_configs_prompts_and_embedded_model(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "build", ".venv"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "isheep_jax"
    data = {
        p.relative_to(ROOT).as_posix()
        for pattern in ("loop/prompts/**/*", "tiny/prompts/*", "tiny/checkpoint/*", "**/*.py")
        for p in package.glob(pattern)
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert data <= names
    assert {f"isheep_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")} <= names
    assert not any(name.startswith("tests/") for name in names)


# A run of one iteration on a random model: nothing is learned, but every stage does its work.
SMALL = [
    "--config=tiny",
    "--iterations=1",
    "--synthesize.instructions=8",
    "--respond.samples=2",
    "--select.fraction=1",
    "--evaluate.limit=64",
    "--sft.epochs=2",
    "--sft.checkpoint_every=1",
    "--sft.batch_size=8",
    "--decode.max_length=512",
    "--decode.slots=16",
    # The small checkpoint was trained on nothing and judges by chance.
    "--guard.judge=off",
]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--model.path=/nowhere"], ["--model.path", "/nowhere"]),
        (["--model.path={tmp}"], ["{tmp}", "config.json"]),
        (["--mesh.fsdp=3"], ["mesh", "3", "8"]),
        (["--mesh.tensor=8", "--mesh.fsdp=1"], ["mesh.tensor", "8"]),
        (["--sft.batch_size=9"], ["sft.batch_size", "9", "8 or 16"]),
        (["--decode.max_length=1024"], ["decode.max_length", "1024", "512"]),
        (["--synthesize.seeds=/nowhere.jsonl"], ["seeds", "/nowhere.jsonl"]),
        (["--workdir={tmp}/other"], ["{tmp}/other", "something else"]),
        (["--workdir=/proc/x"], ["/proc/x", "write"]),
    ],
)
def test_bad_input_leaves_nothing_behind(small_checkpoint, tmp_path, settings, words, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    settings = [s.format(tmp=tmp_path) for s in settings]
    before = sorted(tmp_path.rglob("*"))
    arguments = [*SMALL, f"--model.path={small_checkpoint}", f"--workdir={tmp_path}/run", *settings]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    assert run_command(main, "isheep_jax.train") == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in words:
        assert word.format(tmp=tmp_path) in line
    assert sorted(tmp_path.rglob("*")) == before


def results(directory: Path) -> dict[str, bytes]:
    """What a run leaves that must not depend on when or how often it was started."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for pattern in (
            "**/*.jsonl",
            "**/dataset/**/*",
            "**/model/*",
            "**/evaluation.json",
            "**/summary.json",
        )
        for path in directory.glob(pattern)
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(small_checkpoint, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    """A finished run: its directory, its command's arguments without --workdir, and what it said."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    arguments = [*SMALL, f"--model.path={small_checkpoint}"]
    result = run(*arguments, f"--workdir={directory}")
    assert result.returncode == 0, result.stderr
    return directory, arguments, result


def test_run_ends_with_its_table_and_next_command(finished):
    directory, _, result = finished
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[-1] == f'try it:  python -m isheep_jax.generate --model {directory} --prompt "..."'
    assert any(line.split()[:2] == ["iteration", "instructions"] for line in lines)
    assert any("iteration 1 · synthesize" in line for line in lines)
    assert (directory / "log.txt").read_text() == result.stdout


def test_same_command_on_finished_run_changes_nothing(finished):
    directory, arguments, _ = finished
    before = results(directory)
    main([*arguments, f"--workdir={directory}"])
    assert results(directory) == before


def test_directory_with_another_run_is_refused_with_settings_that_differ(finished):
    directory, arguments, _ = finished
    with pytest.raises(UserError, match=r"respond\.max_tokens was 40, now 7"):
        main([*arguments, f"--workdir={directory}", "--respond.max_tokens=7"])


def test_generate_takes_newest_model_of_run(finished, capsys):
    directory, _, _ = finished
    generate.main(["--model", str(directory), "--prompt", "hello", "--max_tokens=5"])
    assert capsys.readouterr().out.endswith("\n")


def files(directory: Path) -> set[Path]:
    """What lies in a run directory, also half-written, but for the log."""
    found = set()
    for place, _, names in os.walk(directory):  # rglob stops where a directory vanishes under it
        found |= {Path(place, name) for name in names}
    return found - {directory / "log.txt"}


def kill_when_something_is_written(arguments: list[str], directory: Path, delay: float) -> int:
    """Starts the command and kills it `delay` seconds after it wrote a file; its exit code (-9: killed)."""
    before = files(directory)
    command = [sys.executable, "-m", "isheep_jax.train", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=one_device()
    )
    while process.poll() is None:
        if files(directory) - before:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.002)
    return process.wait()


@pytest.mark.slow
def test_run_killed_at_every_step_ends_with_same_files(finished, tmp_path):
    reference, arguments, _ = finished
    arguments = [*arguments, f"--workdir={tmp_path}/run"]
    kills = 0
    while code := kill_when_something_is_written(arguments, tmp_path / "run", delay=0.05 * (kills % 4)):
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 10
    assert results(tmp_path / "run") == results(reference)


def test_run_stopped_by_signals_says_one_line_each_and_ends_with_same_files(finished, tmp_path):
    reference, arguments, _ = finished
    command = [sys.executable, "-m", "isheep_jax.train", *arguments, f"--workdir={tmp_path}/run"]
    for number, words in ((signal.SIGTERM, "iteration 1 · synthesize"), (signal.SIGINT, "iteration 1 · fine-tune")):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, env=one_device(), text=True, **pipes)
        wait_for(process, words)
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 128 + number
        (line,) = errors.splitlines()
        assert line.endswith(f"the same command goes on from here: {shlex.join(['python', *command[1:]])}")
    main([*arguments, f"--workdir={tmp_path}/run"])
    assert results(tmp_path / "run") == results(reference)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_one_line_and_same_command_goes_on(finished, tmp_path):
    reference, arguments, _ = finished
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        result = run(*arguments, f"--workdir={disk}/run")
        assert result.returncode == 2, result.stderr
        assert "No space left" in result.stderr or "no space left" in result.stderr
        assert str(disk) in result.stderr
        assert len(result.stderr.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        result = run(*arguments, f"--workdir={disk}/run")
        assert result.returncode == 0, result.stderr
        assert results(disk / "run") == results(reference)
    finally:
        subprocess.run(["umount", disk], check=True)
