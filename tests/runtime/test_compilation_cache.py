"""Compiled programs are kept where they can be, and nothing else depends on it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from isheep_jax.runtime import devices

ROOT = Path(__file__).parents[2]
CACHE, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Calls `use_compilation_cache` as a new process would, in a home of its own; the settings of the tests return."""
    names = CACHE, ENABLED, "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")

    def call(chosen: str | None = None) -> str | None:
        jax.config.update(CACHE, chosen)
        devices.use_compilation_cache.__wrapped__()
        return getattr(jax.config, CACHE)

    yield call
    for name, value in before.items():
        jax.config.update(name, value)


def cpu(monkeypatch, tmp_path, features: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {features}\nflags\t\t: other\n")
    monkeypatch.setattr(devices, "_CPU_INFO", tmp_path / "cpuinfo")


def test_each_kind_of_cpu_has_a_cache_of_its_own(start, monkeypatch, tmp_path):
    directories = []
    for features in ("fpu avx avx2", "fpu avx", "avx2 fpu avx"):
        cpu(monkeypatch, tmp_path, features)
        directories.append(start())
    assert directories[0] == directories[2] != directories[1]
    assert all(Path(directory).is_dir() and tmp_path / "home" in Path(directory).parents for directory in directories)
    monkeypatch.setattr(devices, "_CPU_INFO", tmp_path / "nowhere")
    assert start() not in (None, *directories)


def test_no_cache_on_cpus_that_xla_does_not_know_again(start, monkeypatch, tmp_path, capfd):
    cpu(monkeypatch, tmp_path, "fpu avx2 avx512f avx512bw")
    assert start() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert start().endswith("/isheep_jax/compiled")
    assert capfd.readouterr().err == ""


def test_directory_that_cannot_be_made_is_one_note(start, monkeypatch, tmp_path, capfd):
    cpu(monkeypatch, tmp_path, "fpu")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert start() is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: programs are compiled in each start")
    jax.config.update(ENABLED, True)
    start(str(tmp_path / "file" / "inside"))
    assert not getattr(jax.config, ENABLED)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"JAX_COMPILATION_CACHE_DIR={tmp_path}/file/inside cannot be written" in line


def test_chosen_directory_is_kept(start, tmp_path):
    assert start(str(tmp_path / "chosen")) == str(tmp_path / "chosen")
    assert start("gs://bucket/compiled") == "gs://bucket/compiled"


def test_user_without_home_has_no_cache(start, monkeypatch, tmp_path, capfd):
    def home():
        raise RuntimeError("Could not determine home directory.")

    cpu(monkeypatch, tmp_path, "fpu")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.chdir(tmp_path)
    assert start() is None
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "isheep_jax").exists()


def test_home_that_cannot_be_written_is_no_obstacle():
    environment = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")}
    program = (
        "import jax; from isheep_jax.runtime.load import use_compilation_cache; use_compilation_cache()\n"
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment | {"HOME": "/dev/null", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        cwd=ROOT,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "2\n")
    assert len(run.stderr.splitlines()) <= 1


@pytest.mark.parametrize("command", [["generate", "--model=tiny", "--prompt=x"], ["plan", "--config=tiny"]])
def test_devices_that_jax_cannot_open_are_one_line(command):
    result = subprocess.run(
        [sys.executable, "-m", f"isheep_jax.{command[0]}", *command[1:]],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=nowhere: jax finds no such device here")
