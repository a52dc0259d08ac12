"""Compiled programs are kept where they can be, and nothing else depends on it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from memory_bucket import memory_bucket
from test_distributed import Group

from isheep_jax.loop.run_directory import COMPILED
from isheep_jax.runtime import devices
from isheep_jax.runtime.compilations import compilations

ROOT = Path(__file__).parents[2]
CACHE, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Calls `use_compilation_cache` as a new process would, in a home of its own; the settings of the tests return."""
    names = CACHE, ENABLED, "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME")

    monkeypatch.setattr(devices, "_directory", None)

    def call(chosen: str | None = None, of_run: epath.Path | None = None) -> str | None:
        jax.config.update(CACHE, chosen or devices._directory)
        devices.use_compilation_cache.__wrapped__(of_run)
        return getattr(jax.config, CACHE)

    yield call
    compilation_cache.reset_cache()
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


# XLA does not take what it wrote on such CPUs.
KEPT = not any(feature.startswith("avx512") for feature in devices._cpu_features())


@pytest.mark.skipif(not KEPT, reason="programs for this CPU are not kept")
def test_a_run_in_a_bucket_keeps_its_programs_there_and_finds_them(start, monkeypatch, tmp_path):
    of_run = memory_bucket(monkeypatch) / "run" / COMPILED
    cpu(monkeypatch, tmp_path, "fpu")
    home = start(of_run=tmp_path / "run" / COMPILED)
    assert home.startswith(str(tmp_path / "home"))
    directory = epath.Path(start(of_run=of_run))
    assert directory.parent == of_run
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def times() -> tuple[int, int]:
        """Starts anew and returns how often the program was compiled, and found."""
        jax.clear_caches()
        before = compilations()

        @jax.jit
        def ours(x):
            return jnp.sin(x) * 2

        assert float(ours(1.0)) == pytest.approx(1.683, abs=1e-3)
        new = compilations() - before
        return new.compiled["jit(ours)"], new.cached["jit(ours)"]

    assert [times(), times()] == [(1, 0), (0, 1)]
    (entry,) = directory.glob("jit_ours-*-cache")
    whole = entry.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], bytes(len(whole))):
        entry.write_bytes(damaged)
        assert times() == (1, 0)
    assert not Path(home).exists() or list(Path(home).iterdir()) == []
    # Another run of the same process has a cache of its own.
    other = start(of_run=of_run.parent / "other")
    assert times() == (1, 0)
    assert list(epath.Path(other).glob("jit_ours-*-cache"))


# A process of a run: it prints how often it compiled the program, and how often it found it.
PROCESS = """
import os, sys
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = f"{sys.argv[1]}/home-{os.environ['JAX_PROCESS_ID']}"
from isheep_jax import distributed

with distributed.distributed_session(lambda error: None):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from etils import epath
    from jax._src import cache_key
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from isheep_jax.runtime.compilations import compilations
    from isheep_jax.runtime.devices import use_compilation_cache

    # Part of jax's key is the topology. That of TPUs and GPUs is of all devices, that of CPUs of this process' own.
    cache_key._hash_accelerator_config = cache_key._hash_devices
    compilations()
    use_compilation_cache(epath.Path(sys.argv[1]) / "run" / "compiled")
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    x = jax.make_array_from_callback((8,), sharding, lambda index: np.ones(8, np.float32)[index])

    @jax.jit
    def ours(x):
        return jnp.sum(x * 2)

    assert float(ours(x)) == 16.0
    counts = compilations()
    print("counts", counts.compiled["jit(ours)"], counts.cached["jit(ours)"])
"""


@pytest.mark.skipif(not KEPT, reason="programs for this CPU are not kept")
def test_what_process_0_compiled_is_found_by_every_process_of_the_next_start(tmp_path):
    found = []
    for start in range(2):
        with Group([["-c", PROCESS, str(tmp_path)]] * 2, tmp_path / f"output-{start}") as group:
            assert group.codes(100) == [0, 0], group.text(1, "err")
        lines = [group.text(index, "out").splitlines() for index in range(2)]
        found.append([line for process in lines for line in process if line.startswith("counts")])
    assert found == [["counts 1 0"] * 2, ["counts 0 1"] * 2]
    assert not any(path.is_file() for path in tmp_path.glob("home-*/**/*"))


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
