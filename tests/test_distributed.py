"""Two processes, as on two hosts, do what one does, and when one fails, none is left waiting."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import results

from isheep_jax import distributed
from isheep_jax import train as train_module
from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.presets import replace_settings

ROOT = Path(__file__).parent.parent

# The tensor axis of decoding and two axes of training lie within a process, `data` goes across both.
SETTINGS = [
    "--config=tiny",
    "--iterations=1",
    "--synthesize.instructions=6",
    "--respond.samples=2",
    "--select.fraction=0.9",
    "--sft.epochs=1",
    "--sft.batch_size=8",
    "--sft.checkpoint_every=1",
    "--evaluate.limit=32",
    "--decode.slots=16",
    "--mesh.data=2",
    "--mesh.fsdp=2",
    "--mesh.tensor=2",
    "--mesh.decode_tensor=2",
]
DEVICES = 8


class Group:
    """Processes that find each other on this machine. Their output goes to files, so that none waits for a reader.

    commands: the arguments of python, one list per process.
    """

    def __init__(self, commands, output: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._output, self.processes = output, []
        output.mkdir()
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        for index, command in enumerate(commands):
            environment = {
                **os.environ,
                "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={DEVICES // len(commands)}"]),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(len(commands)),
                "JAX_PROCESS_ID": str(index),
                "PYTHONPATH": str(ROOT),
            }
            with self._file(index, "out").open("w") as out, self._file(index, "err").open("w") as err:
                self.processes.append(
                    subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, cwd=ROOT, env=environment)
                )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def codes(self, seconds: float = 300) -> list[int]:
        """Returns the exit codes once all processes have exited; a process that hangs is an error."""
        return [process.wait(seconds) for process in self.processes]

    def wait_for(self, index: int, word: str) -> None:
        """Waits until a process has printed the word."""
        while word not in self.text(index, "out"):
            assert all(process.poll() is None for process in self.processes), self.text(0, "err")
            time.sleep(0.1)

    def kill(self, index: int, word: str) -> None:
        """Kills a process as soon as process 0 has printed the word."""
        self.wait_for(0, word)
        self.processes[index].kill()

    def text(self, index: int, stream: str) -> str:
        return self._file(index, stream).read_text()

    def errors(self, index: int) -> list[str]:
        """Returns the error lines on stderr, without the output of libraries."""
        return [line for line in self.text(index, "err").splitlines() if line.startswith("error: ")]

    def _file(self, index: int, stream: str) -> Path:
        return self._output / f"{index}.{stream}"


def train(*settings: str) -> list[str]:
    return ["-m", "isheep_jax.train", *SETTINGS, *settings]


def run(count: int, directory: Path, *settings: str) -> Group:
    """Runs `count` processes to the end."""
    command = train(f"--workdir={directory}", *settings)
    with Group([command] * count, directory.with_name(f"output-{time.monotonic_ns()}")) as group:
        assert group.codes() == [0] * count, [group.text(index, "err")[-2000:] for index in range(count)]
    return group


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Path:
    """A run of one process with eight devices.

    It has joined a cluster of its own, because then its devices sum up in the order in which those of several processes
    do; otherwise the trained weights would differ in their last bits.
    """
    directory = tmp_path_factory.mktemp("one") / "run"
    run(1, directory)
    return directory


def test_two_processes_write_what_one_writes(of_one, tmp_path):
    group = run(2, tmp_path / "run")
    expected = results(of_one)
    assert {"iteration_1/scores/part-00000.jsonl", "iteration_1/model/model.safetensors"} <= expected.keys()
    found = results(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    losses = [
        json.loads((d / "iteration_1" / "fine_tune.json").read_text())["metrics"] for d in (of_one, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    assert "8 cpu devices, mesh 2 data x 2 fsdp x 2 tensor" in group.text(0, "out")
    # Only process 0 prints. The library that connects them prints in both, from threads that cut each other's lines.
    printed = {line for line in group.text(0, "out").splitlines() if line.strip() and "peer rank" not in line}
    assert len(printed) > 5
    assert [line for line in group.text(1, "out").splitlines() if line in printed] == []
    assert group.errors(0) == group.errors(1) == []


def test_hosts_with_other_settings_stop_with_setting_and_host(tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    with Group([train(workdir), train(workdir, "--respond.samples=3")], tmp_path / "output") as group:
        assert group.codes(100) == [2, 2], group.text(0, "err")
        (line,), (same,) = group.errors(0), group.errors(1)
    assert same.endswith(line.removeprefix("error: "))
    assert f"host {host(1)} differs in --respond.samples: 3 there, 2 on" in line
    assert not (tmp_path / "run").exists()


def differing(first: dict, second: dict) -> str:
    """The error of two hosts, a and b, with these facts."""
    facts = [{name: json.dumps(value) for name, value in host.items()} for host in (first, second)]
    with pytest.raises(UserError) as caught:
        distributed._check_equal(facts, ["a", "b"])
    return str(caught.value)


def test_other_seeds_file_is_difference_of_host(tmp_path, monkeypatch):
    config = replace_settings(named_config("tiny"), {"synthesize.seeds": "seeds.jsonl"})
    facts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        seeds = [{"instruction": f"Say {i} in {name}.", "input": "", "output": f"{i}"} for i in range(8)]
        (tmp_path / name / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
        monkeypatch.chdir(tmp_path / name)
        facts.append(train_module._fingerprint(config))
    assert "host b (process 1 of 2) differs in the file of seeds: " in differing(*facts)
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["the file of seeds"]


def test_other_version_of_code_is_difference_of_host(tmp_path, monkeypatch):
    config = named_config("tiny")
    own = train_module._fingerprint(config)
    package = shutil.copytree(ROOT / "isheep_jax", tmp_path / "isheep_jax", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(distributed, "__file__", str(package / "distributed.py"))
    assert train_module._fingerprint(config) == own
    with (package / "loop" / "records.py").open("a") as file:
        file.write("# changed\n")
    assert "host b (process 1 of 2) differs in the source files of isheep_jax: " in differing(
        own, train_module._fingerprint(config)
    )


# A small program without the loop, with shorter timeouts.
PROGRAM = """
import os, sys, time
from isheep_jax import distributed
from isheep_jax.cli import signals
from isheep_jax.cli.errors import report_error, run_command
from isheep_jax.errors import UserError

distributed._HEARTBEAT_TIMEOUT, distributed._VISIBLE_WITHIN = 6.0, 2.0
index = int(os.environ["JAX_PROCESS_ID"])


def asked_once():
    assert index == 0
    return {"seen by": index}


def refuse():
    raise UserError("there is no such file")


def main(arguments):
    with distributed.distributed_session(lambda error: report_error(error, "program", [])):
        assert distributed.is_distributed() and distributed.is_primary() == (index == 0)
        assert distributed.from_primary(asked_once) == {"seen by": 0}
        print("joined", flush=True)
        exec(sys.argv[1], globals())
        print("done", flush=True)


signals.listen()
sys.exit(run_command(main, "program"))
"""


def small_program(tmp_path: Path, body: str, count: int = 2) -> Group:
    return Group([["-c", PROGRAM, body]] * count, tmp_path / "output")


def host(index: int, count: int = 2) -> str:
    return f"{socket.gethostname()} (process {index} of {count})"


def test_processes_that_agree_continue_and_end_together(tmp_path):
    body = f"distributed.check_agreement({{'a': [1]}}); distributed.check_shared({str(tmp_path)!r})"
    with small_program(tmp_path, body) as group:
        assert group.codes(100) == [0, 0]
        assert [group.text(index, "out").split()[-1] for index in (0, 1)] == ["done", "done"]
    assert {path.name for path in tmp_path.iterdir()} == {"output"}


def test_error_of_process_0_is_everyones(tmp_path):
    with small_program(tmp_path, "distributed.from_primary(refuse)") as group:
        assert group.codes(100) == [2, 2]
        for index in (0, 1):
            assert "there is no such file" in group.errors(index)[0]
            assert len(group.errors(index)) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [("UserError('the disk is full')", 2, "the disk is full"), ("ValueError('a bug')", 1, "ValueError: a bug")],
)
def test_error_in_one_process_ends_others_with_its_host_and_words(tmp_path, error, code, words):
    body = f"if index == 1: raise {error}\nwhile True: time.sleep(1)"
    with small_program(tmp_path, body) as group:
        assert group.codes(100) == [code, code]
        assert group.errors(0) == [f"error: {host(1)}: {words}"]
        assert words in group.text(1, "err")


def test_of_three_processes_one_that_is_killed_is_named_by_others(tmp_path):
    with small_program(tmp_path, "while True: time.sleep(1)", count=3) as group:
        group.kill(1, "joined")
        assert group.codes(60) == [1, -9, 1]
        for index in (0, 2):
            assert group.errors(index) == [
                f"error: {host(1, 3)}: no sign of life for 6 s: killed, preempted or cut off; start every process again"
            ]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "body", ["while True: time.sleep(1)", "distributed.from_primary(lambda: time.sleep(100))"], ids=["busy", "waiting"]
)
def test_without_process_0_others_end_with_one_line(tmp_path, count, body):
    with small_program(tmp_path, body, count) as group:
        group.kill(0, "joined")
        assert group.codes(60) == [-9] + [1] * (count - 1)
        for index in range(1, count):
            (line,) = group.text(index, "err").splitlines()
            assert line == (
                f"error: {host(0, count)}, which coordinates the others, is gone; start every process again"
            )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "body", ["while True: time.sleep(1)", "distributed.from_primary(lambda: time.sleep(100))"], ids=["busy", "waiting"]
)
def test_signal_to_one_process_ends_all_with_one_line(tmp_path, index, body):
    with small_program(tmp_path, body) as group:
        group.wait_for(0, "joined")
        group.processes[index].terminate()
        assert group.codes(60) == [143, 143]
        (line,), (other,) = (group.text(i, "err").splitlines() for i in (index, 1 - index))
    assert line.startswith("stopped by SIGTERM; ")
    assert other == f"error: {host(index)}: stopped by SIGTERM"


@pytest.mark.parametrize("signaled", [(0,), (1,), (0, 1)], ids=["0", "1", "both"])
def test_signal_ends_work_in_steps_of_all_processes_before_the_same_step(tmp_path, signaled):
    body = """
from isheep_jax import stopping
with stopping.between_steps() as stop:
    for step in range(1000):
        if stop.is_asked_for(step):
            print("saved", step, flush=True)
            stop.leave()
        distributed.wait_for_all()
        if step == 3:
            print("working", flush=True)
        time.sleep(0.01 * index)
"""
    with small_program(tmp_path, body) as group:
        group.wait_for(0, "working")
        for index in signaled:
            group.processes[index].terminate()
        assert group.codes(60) == [143, 143]
        saved = [group.text(index, "out").splitlines()[-1] for index in (0, 1)]
        assert saved[0].startswith("saved ")
        assert saved[0] == saved[1]
        assert [len(group.text(index, "err").splitlines()) for index in (0, 1)] == [1, 1]


def test_directory_that_only_some_hosts_see_names_others(tmp_path):
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
    with small_program(tmp_path, f"distributed.check_shared({str(tmp_path)!r} + '/' + str(index))") as group:
        assert group.codes(100) == [2, 2]
        assert f"{tmp_path}/0 is not shared: {host(1)} cannot read what {host(0)} writes there" in group.errors(0)[0]
    assert [*(tmp_path / "0").iterdir(), *(tmp_path / "1").iterdir()] == []


@pytest.mark.slow
def test_run_whose_processes_are_killed_resumes_to_same_records(tmp_path):
    settings = "--iterations=2"
    run(1, tmp_path / "one", settings)
    command = train(f"--workdir={tmp_path}/two", settings)
    with Group([command] * 2, tmp_path / "first") as group:
        group.kill(1, "iteration 1 · respond")
        assert group.codes(200) == [1, -9]
        assert group.errors(0) == [
            f"error: {host(1)}: no sign of life for 40 s: killed, preempted or cut off; start every process again"
        ]
    with Group([command] * 2, tmp_path / "second") as group:
        group.kill(0, "iteration 1 · fine-tune")
        killed, other = group.codes(200)
        assert killed == -9
        assert other not in (0, None)
    run(2, tmp_path / "two", settings)
    expected, found = results(tmp_path / "one"), results(tmp_path / "two")
    assert "iteration_2/model/model.safetensors" in expected
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
