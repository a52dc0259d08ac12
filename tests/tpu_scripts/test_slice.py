"""Creating, installing on, running on, watching, stopping and deleting a slice, against the stand-in for gcloud."""

import os
import subprocess
import sys
import time

import pytest
from slice_stand_in import SCRIPTS

GENERATE = ["--", "python", "-m", "isheep_jax.generate", "--prompt", "it's a test"]
WAITING = 'while [ ! -e "$STAND_IN/go" ]; do sleep 0.02; done\n'


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_create_waits_until_slice_is_active_and_says_each_state_once(pod):
    pod.set(on_create="WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    out = pod.run("create.sh", "pod", "--type=v4-16").stdout
    assert out.count("WAITING_FOR_RESOURCES") == out.count("PROVISIONING") == 1
    assert "8 chip-hours every hour" in out
    assert pod.verbs() == ["create"]


def test_create_waits_for_request_that_is_there_already(pod):
    pod.set(states="PROVISIONING\nPROVISIONING\nACTIVE\n")
    pod.run("create.sh", "pod", "--type=v4-16")
    assert pod.verbs() == []


def test_create_refuses_name_that_belongs_to_another_slice(pod):
    pod.set(states="ACTIVE\n")
    assert "v4-16" in pod.run("create.sh", "pod", "--type=v4-32", code=1).stderr


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ("PROVISIONING\nFAILED\n", ["no more capacity in the zone", "delete.sh pod"]),
        ("PROVISIONING\nSUSPENDED\n", ["taken away", "supervise.sh"]),
        ("PROVISIONING\nDELETING\n", ["deleted"]),
        ("PROVISIONING\nNETWORK\n", ["does not answer", "problem with the network"]),
    ],
)
def test_create_explains_request_that_comes_to_nothing(pod, states, words):
    pod.set(on_create=states)
    error = pod.run("create.sh", "pod", "--type=v4-16", code=1).stderr
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_create_does_not_mistake_broken_network_for_missing_slice(pod):
    pod.set(states="NETWORK\n")
    pod.run("create.sh", "pod", "--type=v4-16", code=1)
    assert pod.verbs() == []


def test_install_puts_tracked_files_on_every_worker(pod):
    pod.set(states="ACTIVE\n")
    pod.run("install.sh", "pod")
    for worker in (0, 1):
        source = pod.worker(worker) / "source"
        assert (source / "setup.py").is_file()
        assert (source / "isheep_jax" / "train.py").is_file()
        assert not (source / ".git").exists()
        calls = (pod.directory / f"uv_calls_{worker}").read_text().splitlines()
        assert calls[0].endswith("--python 3.11 venv")
        assert calls[1].endswith("./source[tpu]")


def test_install_fails_when_worker_has_another_version(pod):
    pod.set(states="ACTIVE\n", old_version_1="")
    error = pod.run("install.sh", "pod", code=1).stderr
    assert "isheep_jax=0.0.9" in error
    assert "workers differ" in error


def test_install_fails_when_jax_does_not_see_whole_slice(pod):
    pod.set(states="ACTIVE\n", devices="4\n")
    error = pod.run("install.sh", "pod", code=1).stderr
    assert "8 chips" in error
    assert "devices=4" in error


def test_install_fails_when_worker_does_not_answer(pod):
    pod.set(states="ACTIVE\n", silent_1="")
    assert "ssh-add" in pod.run("install.sh", "pod", code=1).stderr


def test_install_leaves_run_that_is_going_on_alone(pod):
    pod.ready()
    pod.set(program=WAITING)
    pod.run("run.sh", "pod", *GENERATE)
    assert "a run is going on" in pod.run("install.sh", "pod", code=1).stderr
    assert " state=running " in pod.run("watch.sh", "pod", "--once").stdout


def test_run_has_log_on_every_worker_and_its_arguments_arrive_whole(pod):
    pod.ready()
    pod.set(program='echo "worker $ISHEEP_WORKER"\nprintf "<%s>" "$@"\n')
    pod.run("run.sh", "pod", "--wait", *GENERATE)
    for worker in (0, 1):
        log = pod.log(worker)
        assert log.startswith(f"worker {worker}\n")
        assert log.endswith("<-m><isheep_jax.generate><--prompt><it's a test>")


def test_run_outlives_session_that_started_it(pod):
    pod.ready()
    pod.set(program=WAITING + "echo done\n")
    pod.run("run.sh", "pod", *GENERATE)
    assert pod.run("watch.sh", "pod", "--once").stdout.count(" state=running ") == 2
    pod.set(go="")
    wait_for(lambda: pod.run("watch.sh", "pod", "--once").stdout.count(" state=finished ") == 2)
    assert pod.log(0) == pod.log(1) == "done\n"


def test_second_run_is_refused_while_one_is_going_on(pod):
    pod.ready()
    pod.set(program=WAITING)
    pod.run("run.sh", "pod", *GENERATE)
    assert "running something already" in pod.run("run.sh", "pod", *GENERATE, code=1).stderr
    assert pod.verbs().count("start") == 1


def test_wait_gives_commands_exit_code_and_ends_other_workers(pod):
    pod.ready()
    pod.set(program=f'[ "$ISHEEP_WORKER" = 0 ] || exit 7\n{WAITING}')
    error = pod.run("run.sh", "pod", "--wait", *GENERATE, code=7).stderr
    assert "worker=1 state=failed" in error
    assert "state=running" not in pod.run("watch.sh", "pod", "--once").stdout


def test_killed_process_is_told_from_one_that_finished(pod):
    pod.ready()
    pod.set(program=WAITING)
    pod.run("run.sh", "pod", *GENERATE)
    os.killpg(int((pod.worker(1) / "current" / "pid").read_text()), 9)
    wait_for(lambda: "worker=1 state=killed" in pod.run("watch.sh", "pod", "--once").stdout)


def test_worker_that_does_not_answer_keeps_run_from_starting(pod):
    pod.ready()
    pod.set(silent_1="")
    assert "ssh to worker 1" in pod.run("run.sh", "pod", *GENERATE, code=1).stderr
    assert "start" not in pod.verbs()


def test_worker_that_cannot_start_ends_others(pod):
    pod.ready()
    pod.set(program=WAITING)
    (pod.worker(1) / "venv" / "bin" / "python").unlink()
    assert "did not start" in pod.run("run.sh", "pod", "--env=TOKEN=secret", *GENERATE, code=1).stderr
    assert list(pod.directory.rglob("*.environment")) == []
    assert "worker=0 state=running" not in pod.run("watch.sh", "pod", "--once").stdout


def test_slice_without_package_is_told_to_install(pod):
    pod.set(states="ACTIVE\n")
    assert "install.sh pod" in pod.run("run.sh", "pod", *GENERATE, code=1).stderr


def test_variables_reach_every_worker_and_are_neither_shown_nor_kept(pod):
    pod.ready()
    pod.set(program='echo "$HF_TOKEN|$XLA_FLAGS"\n')
    flags = "--env=XLA_FLAGS=--xla_a=1 --xla_b='x'"
    result = pod.run("run.sh", "pod", "--wait", "--env=HF_TOKEN", flags, *GENERATE, HF_TOKEN="a $secret")
    assert pod.log(0) == pod.log(1) == "a $secret|--xla_a=1 --xla_b='x'\n"
    shown = result.stdout + result.stderr + (pod.directory / "calls").read_text()
    assert "$secret" not in shown
    # Escaped in the file that carries it, plain in the logs.
    kept = subprocess.run(["grep", "-rlE", r"a.{1,4}secret", pod.directory], capture_output=True, text=True)
    assert {path.rsplit("/", 1)[1] for path in kept.stdout.split()} == {"log.txt"}


def test_training_without_shared_run_directory_is_warned_of(pod):
    pod.ready()
    train = ["--", "python", "-m", "isheep_jax.train", "--config=tiny"]
    assert "gs://" in pod.run("run.sh", "pod", "--wait", *train).stderr
    assert pod.run("run.sh", "pod", "--wait", *train, "--workdir=gs://bucket/run").stderr.count("warning") == 0


def test_watch_shows_end_of_chosen_log(pod):
    pod.ready()
    pod.set(program='for n in 1 2 3; do echo "$ISHEEP_WORKER line $n"; done\n')
    pod.run("run.sh", "pod", "--wait", *GENERATE)
    shown = pod.run("watch.sh", "pod", "--once", "--worker=1", "--lines=2").stdout
    assert shown.endswith("1 line 2\n1 line 3\n")
    assert "request ACTIVE, machines READY" in shown
    every = pod.run("watch.sh", "pod", "--once", "--worker=all", "--lines=1").stdout
    assert "worker 0: 0 line 3\n" in every
    assert "worker 1: 1 line 3\n" in every


def test_watch_fetches_log_per_worker(pod):
    pod.ready()
    pod.set(program='echo "worker $ISHEEP_WORKER"\n')
    pod.run("run.sh", "pod", "--wait", *GENERATE)
    logs = pod.directory / "logs"
    pod.run("watch.sh", "pod", f"--fetch={logs}")
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        "worker_0.txt": "worker 0\n",
        "worker_1.txt": "worker 1\n",
    }


def test_watch_says_that_slice_is_lost(pod):
    pod.set(states="SUSPENDED\n", node_state="PREEMPTED\n")
    assert "request SUSPENDED, machines PREEMPTED" in pod.run("watch.sh", "pod", code=1).stdout


def test_stop_ends_what_runs_on_every_worker(pod):
    pod.ready()
    pod.set(program=WAITING)
    pod.run("run.sh", "pod", *GENERATE)
    pod.run("stop.sh", "pod")
    assert pod.run("watch.sh", "pod", "--once").stdout.count(" state=stopped ") == 2
    assert "nothing is running" in pod.run("stop.sh", "pod").stderr


def test_stop_kills_what_does_not_end_by_itself(pod):
    pod.ready()
    pod.set(program="trap : TERM\n" + WAITING)
    pod.run("run.sh", "pod", *GENERATE)
    pod.run("stop.sh", "pod", **{"ISHEEP_STOP_SECONDS": "0"})
    assert pod.run("watch.sh", "pod", "--once").stdout.count(" state=stopped ") == 2


def test_delete_may_be_repeated(pod):
    pod.set(states="ACTIVE\n")
    pod.run("delete.sh", "pod", "--yes")
    assert pod.commands()[-1][2:] == ["queued-resources", "delete", "pod", "--force", "--quiet"]
    assert "no such slice" in pod.run("delete.sh", "pod", "--yes").stdout
    assert pod.verbs() == ["delete"]


def test_check_reports_whole_slice_from_every_worker(tmp_path):
    """The Python part of worker.sh runs with a fake jax module that must be initialized first."""
    root = tmp_path / "isheep_jax"
    (root / "venv" / "bin").mkdir(parents=True)
    (root / "venv" / "source_label").write_text("abc1234\n")
    (root / "venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "jax.py").write_text(
        "__version__ = '1.2.3'\n"
        "class distributed:\n"
        "    def initialize():\n"
        "        global devices; devices = 8\n"
        "def device_count(): return devices\n"
        "def process_count(): return 2\n"
        "def default_backend(): return 'tpu'\n"
    )
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "modules")}
    command = ["bash", SCRIPTS / "worker.sh", "check"]
    line = subprocess.run(
        command, env=environment | {"ISHEEP_WORKER": "3"}, capture_output=True, text=True, check=True
    ).stdout
    assert line.startswith("worker=3 isheep_jax=")
    assert " source=abc1234 " in line
    assert " jax=1.2.3 " in line
    assert line.endswith(" platform=tpu devices=8 processes=2\n")
