"""A supervised run finishes whatever happens to its slice, or gives up with a reason."""

import os
import signal
import subprocess
import time

RUN = ["--type=v4-16", "--spot"]
TRAIN = ["--", "python", "-m", "isheep_jax.train", "--config=tiny", "--workdir=gs://bucket/run"]
ATTEMPT = ["scp", "install", "check", "start"]
WAITING = 'while [ ! -e "$STAND_IN/go" ]; do sleep 0.02; done\n'
# The first slice is lost while this waits; on a second one it ends.
WAITING_ONCE = f'[ "$(cat "$STAND_IN/creations")" != 1 ] || {WAITING}echo resumed\n'


def supervise(pod, *options, code=0):
    return pod.run("supervise.sh", "pod", *RUN, *options, *TRAIN, code=code)


def test_command_runs_to_its_end_on_new_slice(pod):
    assert "finished" in supervise(pod).stdout
    assert pod.verbs() == ["create", *ATTEMPT]


def test_slice_is_deleted_at_end_if_wished(pod):
    supervise(pod, "--delete")
    assert pod.verbs() == ["create", *ATTEMPT, "delete"]


def test_preempted_slice_is_created_again_and_same_command_runs_there(pod):
    pod.set(program=WAITING_ONCE, lose_after="4\n")
    out = supervise(pod).stdout
    assert "is lost (request SUSPENDED" in out
    assert pod.verbs() == ["create", *ATTEMPT, "delete", "create", *ATTEMPT]
    starts = [call[-1].split(" -- ")[1] for call in pod.commands() if " start " in call[-1]]
    assert starts == ["python -m isheep_jax.train --config=tiny --workdir=gs://bucket/run"] * 2
    creates = [call for call in pod.commands() if "create" in call]
    assert creates[0] == creates[1]
    assert "--spot" in creates[0]
    assert pod.log(0) == pod.log(1) == "resumed\n"


def test_slice_whose_machines_were_preempted_is_lost_though_its_request_is_active(pod):
    pod.ready()
    pod.set(node_state="PREEMPTED\n")
    supervise(pod)
    assert pod.verbs() == ["delete", "create", *ATTEMPT]


def test_request_that_failed_is_made_again(pod):
    pod.set(states="FAILED\n")
    supervise(pod)
    assert pod.verbs() == ["delete", "create", *ATTEMPT]


def test_slice_that_is_lost_again_and_again_is_given_up(pod):
    pod.set(on_create="PROVISIONING\nFAILED\n")
    error = supervise(pod, "--max-preemptions=2", code=1).stderr
    assert "--max-preemptions" in error
    assert pod.verbs() == ["create", "delete", "create", "delete", "create"]


def test_command_that_fails_is_started_again_on_same_slice(pod):
    pod.set(
        program='[ ! -e "$STAND_IN/failed_$ISHEEP_WORKER" ] || exit 0\n: >"$STAND_IN/failed_$ISHEEP_WORKER"\nexit 1\n'
    )
    out = supervise(pod).stdout
    assert "failures in a row: 1" in out
    assert pod.verbs() == ["create", *ATTEMPT, "end", "start"]


def test_command_that_always_fails_is_given_up_with_its_exit_code(pod):
    pod.set(program="exit 7\n")
    assert "--max-failures" in supervise(pod, "--max-failures=2", code=7).stderr
    assert pod.verbs().count("start") == 2


def test_command_that_refuses_its_settings_is_not_tried_again(pod):
    pod.set(program="exit 2\n")
    assert "not trying again" in supervise(pod, code=2).stderr
    assert pod.verbs().count("start") == 1


def test_installation_that_fails_is_tried_again(pod):
    pod.set(devices="4\n")
    supervise(pod, "--max-failures=2", code=1)
    assert pod.verbs() == ["create", "scp", "install", "check", "scp", "install", "check"]


def test_network_that_is_down_deletes_nothing(pod):
    pod.ready()
    pod.set(states="NETWORK\n" * 5 + "ACTIVE\n")
    supervise(pod)
    assert "delete" not in pod.verbs()
    assert "create" not in pod.verbs()


def test_workers_that_do_not_answer_for_while_keep_their_run(pod):
    pod.set(program=WAITING)
    process = start_in_background(pod)
    pod.set(silent_1="")
    time.sleep(0.5)
    (pod.directory / "silent_1").unlink()
    pod.set(go="")
    assert process.wait(timeout=30) == 0
    assert pod.verbs() == ["create", *ATTEMPT]


def start_in_background(pod):
    process = subprocess.Popen(
        pod.command("supervise.sh", "pod", *RUN, *TRAIN),
        env=pod.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 30
    # The start has ended once another command follows it.
    while not any(" start " in call[-1] for call in pod.commands()[:-1]):
        assert time.monotonic() < end
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    return process


def test_two_supervisors_do_not_share_slice(pod):
    pod.set(program=WAITING)
    process = start_in_background(pod)
    refusal = supervise(pod, code=1).stderr
    assert f"process {process.pid} supervises pod already" in refusal
    assert f"kill {process.pid}" in pod.run("delete.sh", "pod", "--yes", code=1).stderr
    pod.set(go="")
    assert process.wait(timeout=30) == 0
    # The lock goes with its owner.
    supervise(pod)


def test_lock_without_living_owner_is_taken_over(pod):
    locks = pod.directory / "laptop" / ".isheep_jax"
    locks.mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (locks / "my-project.my-zone.pod.lock").symlink_to(str(ended.pid))
    supervise(pod)


def test_supervisor_that_ends_leaves_run_and_next_one_takes_it_over(pod):
    pod.set(program=WAITING)
    process = start_in_background(pod)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert pod.run("watch.sh", "pod", "--once").stdout.count(" state=running ") == 2
    process = subprocess.Popen(
        pod.command("supervise.sh", "pod", *RUN, *TRAIN), env=pod.environment, stdout=subprocess.PIPE, text=True
    )
    assert "taking over" in process.stdout.readline()
    pod.set(go="")
    assert "finished" in process.communicate(timeout=30)[0]
    assert pod.verbs().count("start") == 1


def test_run_that_person_stopped_is_not_started_again(pod):
    pod.set(program=WAITING)
    process = start_in_background(pod)
    pod.run("stop.sh", "pod")
    assert process.wait(timeout=30) == 1
    assert "stopped by stop.sh" in process.stdout.read()
    assert pod.verbs().count("start") == 1
