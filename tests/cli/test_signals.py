"""A signal ends a command in time, with one line and its exit code, whatever the command is doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isheep_jax.cli import signals

# A command whose body is its first argument; it says "ready" when it is time for a signal.
PROGRAM = """
import ctypes, sys, time
from isheep_jax.cli import signals
from isheep_jax.cli.errors import run_command

signals.PATIENCE = float(sys.argv[2])
signals.listen()


def ready():
    print("ready", flush=True)


def main(arguments):
    exec(arguments[0], globals())


sys.exit(run_command(main, "isheep_jax.train"))
"""

SLEEPS = "ready(); time.sleep(100)"
# As in a compilation, the main thread runs no Python.
IN_C = "ready(); ctypes.CDLL(None).sleep(100)"
CAUGHT = """
ready()
for _ in range(100):
    try:
        time.sleep(1)
    except BaseException:
        pass
"""
CHANGED = """
ready()
try:
    time.sleep(100)
except BaseException as error:
    raise RuntimeError("INTERNAL: callback failed") from error
"""
LOST = """
import gc
gc.callbacks.append(lambda *_: (ready(), time.sleep(100)))
gc.collect()
time.sleep(100)
"""
# Compiled modules of libraries import others, and print what interrupts them.
IMPORTS = """
import pathlib, tempfile
with tempfile.TemporaryDirectory() as directory:
    pathlib.Path(directory, "slow.py").write_text("import __main__; __main__.ready(); __main__.time.sleep(100)")
    sys.path.insert(0, directory)
    try:
        import slow
    finally:
        print("goes on", flush=True)
        time.sleep(100)
"""
# What is found of a module whose import is interrupted in its middle.
HALF_IMPORTED = """
sys.modules["isheep_jax.distributed"] = type(sys)("isheep_jax.distributed")
ready()
time.sleep(100)
"""
CLEANS = """
try:
    ready()
    time.sleep(100)
finally:
    print("cleaned", flush=True)
    time.sleep(100)
"""


# Work in steps, each of which takes half a second and begins with a wait for a signal.
STEPS = """
from isheep_jax import stopping
with stopping.between_steps() as stop:
    for step in range(100):
        if stop.is_asked_for(step):
            print("saved", step, flush=True)
            stop.leave()
        if step == 1:
            ready()
        time.sleep(0.5)
"""


def started(body: str, patience: float = 60, ignored: tuple = ()) -> subprocess.Popen:
    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    command = [sys.executable, "-c", PROGRAM, body, str(patience)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def ending(process: subprocess.Popen) -> tuple[int, list[str]]:
    """Returns the exit code and the lines of standard error; a process that goes on is an error."""
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_signal_ends_command_with_one_line_and_its_code(number, name):
    process = started(SLEEPS)
    process.send_signal(number)
    code, (line,) = ending(process)
    assert code == 128 + number
    assert line.startswith(f"stopped by {name}; the same command goes on from here: python -m ")


@pytest.mark.parametrize("body", [IN_C, CAUGHT], ids=["in C", "caught"])
def test_signal_that_main_thread_does_not_see_ends_command_after_its_patience(body):
    process = started(body, patience=0.5)
    process.send_signal(signal.SIGTERM)
    code, lines = ending(process)
    assert (code, len(lines)) == (143, 1)


@pytest.mark.parametrize(
    "body",
    [LOST, CHANGED, IMPORTS, HALF_IMPORTED],
    ids=["lost in a callback", "changed to another error", "in an import", "half imported"],
)
def test_signal_whose_exception_library_loses_ends_command_at_once(body):
    process = started(body)
    process.send_signal(signal.SIGINT)
    code, lines = ending(process)
    assert (code, len(lines)) == (130, 1)


def test_command_cleans_up_at_first_signal_and_ends_at_once_at_second():
    process = started(CLEANS)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaned\n"
    process.send_signal(signal.SIGINT)
    code, lines = ending(process)
    assert (code, len(lines)) == (130, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_in_steps_ends_after_a_step_and_saves_longer_than_patience(number):
    process = started(STEPS, patience=0.1)
    process.send_signal(number)
    assert process.stdout.readline() == "saved 2\n"
    code, (line,) = ending(process)
    assert code == 128 + number
    assert line.startswith("stopped by ")


def test_second_signal_ends_work_in_steps_at_once():
    process = started(STEPS.replace("time.sleep(0.5)", "time.sleep(step and 100)"))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    code, lines = ending(process)
    assert (code, len(lines)) == (143, 1)


def test_command_under_nohup_goes_on_at_its_hang_up():
    process = started("ready(); time.sleep(0.5); print('done')", ignored=(signal.SIGHUP,))
    process.send_signal(signal.SIGHUP)
    assert ending(process) == (0, [])


def test_interrupt_in_conversation_is_conversations_and_other_signals_still_end_it():
    body = """
with signals.interrupts_handled():
    for _ in range(2):
        try:
            ready()
            time.sleep(100)
        except KeyboardInterrupt:
            pass
"""
    process = started(body)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    code, lines = ending(process)
    assert (code, len(lines)) == (143, 1)


def test_reader_that_is_stuck_holds_no_command():
    process = started("ready()\nwhile True: print('x' * 1000)")
    time.sleep(1)  # until the pipe is full
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert len(process.stderr.read().splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the instant is read from /proc")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2])
def test_signal_while_a_command_is_being_imported_is_no_traceback(delay):
    command = [sys.executable, "-m", "isheep_jax.train", "--config=tiny", "--workdir=/nowhere/run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threads = Path(f"/proc/{process.pid}/task")
    while len([*threads.iterdir()]) < 2:  # until a thread waits for signals, before the imports of the command
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code, lines = ending(process)
    assert (code, len(lines)) == (130, 1), lines


@pytest.mark.parametrize(
    ("module", "arguments", "goes_on"),
    [
        ("train", ["--config=tiny"], True),
        ("judge", ["--config=tiny", "--output=check.json"], False),
        ("generate", ["--model=m", "--prompt=a"], False),
        ("generate", ["--model=m", "--input=a"], False),
        ("generate", ["--model=m", "--input=a", "--output=b"], True),
        ("generate", ["--model", "m", "--input", "a", "--output", "b"], True),
    ],
)
def test_only_a_command_that_keeps_what_it_has_done_is_said_to_go_on(module, arguments, goes_on):
    assert ("goes on" in signals.how_to_go_on(f"isheep_jax.{module}", arguments)) == goes_on
