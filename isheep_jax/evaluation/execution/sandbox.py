"""Tests programs that a model wrote, each in a sandbox of its own.

**What a program is kept from.** It runs as a process without rights in namespaces of its own (user, mount, process,
network, IPC, host name, cgroup): no network, not even loopback; no process but its supervisor can be seen or signalled;
of the files only the interpreter and the system's libraries can be read, and only a directory in memory can be written.
The environment is empty, standard input and output lead nowhere. Memory, CPU time, processes, file sizes, disk and open
files are limited, and memory that counts for no process cannot be had (System V IPC, message queues, memfd). All of it
ends with the verdict, at the latest at the time limit: the kernel kills whatever a namespace still holds when its first
process ends, however often it forked, and the files were never on a disk.

**What proves that it passed.** Neither an exit status nor a printed word, which a program can produce itself. The tests
run in the supervisor, which calls the program's functions in the other process and gets plain values back. After the
last test it prints the nonce that only this call knows and that never was in the program's process. A program that
patches built-ins, searches frames and memory, exits or prints whatever it likes changes its own process only.

**Where the limits of this are.** It is as strong as the kernel's namespaces; a hole in the kernel is a hole in it. Each
process of a program may use the memory limit, so a program can use `processes` times as much. What refuses memory that
counts for no process is a filter of system calls, which is there for x86-64 and ARM64; other processors have only the
namespace's own limits, where /proc/sys can be written. Whether a value is equal is decided by the supervisor, for plain
values (numbers, strings, lists, tuples, sets, dicts, ranges, decimals); other objects stay in the program's process and
are equal only to themselves. A result that takes more than 64 MiB as JSON fails. Arguments are copies: what a function
does to them does not reach the tests. Only the standard library can be imported.

The namespaces are made by `isolation.py`, without any privilege, where the kernel allows it; else by bubblewrap.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.execution import isolation
from isheep_jax.files import utf8

_HERE = Path(__file__).parent
_START = 20.0  # seconds that a loaded machine may take to start a program


@dataclass(frozen=True)
class Limits:
    """Most that one program may use.

    seconds: from its start to the last test.
    cpu_seconds: of CPU time of each process, which unlike `seconds` does not depend on what else the machine does.
    call_cpu_seconds: of CPU time of each call.
    idle_seconds: without using any CPU time, such as sleeping, in a call.
    memory: bytes of address space of each process.
    processes: besides the first.
    file_size, disk: bytes of each file, and of all files; they are in memory.
    open_files: count.
    """

    seconds: float = 30.0
    cpu_seconds: int = 10
    call_cpu_seconds: float = 10.0
    idle_seconds: float = 4.0
    memory: int = 1 << 30
    processes: int = 4
    file_size: int = 16 << 20
    disk: int = 64 << 20
    open_files: int = 64


LIMITS = Limits()


@dataclass(frozen=True)
class Program:
    """A program and its tests.

    source: text of a Python module.
    tests: text of a Python module that raises an exception if the program is wrong; it is trusted.
    names: what the tests use of the program: functions, classes, constants.
    modules: modules of the standard library that the tests use if the program imports them. They get the real ones.
    """

    source: str
    tests: str
    names: tuple[str, ...]
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests, and else why it did not, in one line."""

    passed: bool
    reason: str = ""


def check_allowed(settings: EvaluateConfig) -> None:
    """Raises `UserError` where the settings or the machine do not let programs run."""
    if not settings.allow_code_execution:
        raise UserError(
            "evaluate.allow_code_execution: this task runs programs that the model writes, and that is off; "
            "--evaluate.allow_code_execution allows it: each program runs in a sandbox without network, files or rights"
        )
    _launcher()


def run_programs(
    programs: Sequence[Program],
    settings: EvaluateConfig,
    advance: Callable[[], None] = lambda: None,
    limits: Limits = LIMITS,
) -> list[Verdict]:
    """Returns the verdict on each program.

    programs: run at the same time, one per CPU.
    settings: must allow it. Raises `UserError` as `check_allowed`.
    advance: called after each program.
    limits: of each program.
    """
    check_allowed(settings)
    command = _launcher()
    running: set[subprocess.Popen] = set()

    def run(program: Program) -> Verdict:
        return _run(command, program, limits, running)

    verdicts: dict[concurrent.futures.Future, Verdict] = {}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            futures = [pool.submit(run, program) for program in programs]
            for future in concurrent.futures.as_completed(futures):
                verdicts[future] = future.result()
                advance()
        finally:  # also when the user interrupts
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                _kill(process)
    return [verdicts[future] for future in futures]


Launcher = Callable[[Limits], list[str]]


@functools.cache
def _launcher() -> Launcher:
    """Returns how a supervisor is started here. Raises `UserError` where no sandbox can be made."""
    reasons = []
    for name, command in (("namespaces", _with_namespaces), ("bubblewrap", _with_bubblewrap)):
        reason = _why_not(command)
        if not reason:
            return command
        reasons.append(f"{name}: {reason}")
    raise UserError(
        f"evaluate.allow_code_execution: no sandbox can be made here ({'; '.join(reasons)}); install bubblewrap, allow "
        "user namespaces, or evaluate the code tasks on another machine"
    )


def _why_not(command: Launcher) -> str:
    """Returns why programs cannot be run by this command; "" if they can."""
    if not sys.platform.startswith("linux"):
        return "only on Linux"
    if command is _with_bubblewrap and not shutil.which("bwrap"):
        return "not installed"
    if command is _with_bubblewrap and os.getuid() == 0:
        return "as root it cannot limit the number of processes"
    probe = Program("def one():\n    return 1\n", "assert one() == 1\n", ("one",))
    return _run(command, probe, LIMITS, set()).reason


def _interpreter() -> str:
    """Returns the path of the interpreter itself, not of a virtual environment's link to it."""
    return str(Path(sys.executable).resolve())


def _with_namespaces(limits: Limits) -> list[str]:
    return [_interpreter(), "-I", "-S", "-B", str(_HERE / "isolation.py"), json.dumps(asdict(limits))]


def _with_bubblewrap(limits: Limits) -> list[str]:
    interpreter = Path(_interpreter())
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    command += ["--as-pid-1", "--clearenv", "--uid", isolation.NOBODY, "--gid", isolation.NOBODY, "--cap-drop", "ALL"]
    command += ["--size", limits.disk, "--perms", "1777", "--tmpfs", "/tmp"]
    for path in dict.fromkeys((*isolation.SYSTEM, sys.base_prefix, sys.base_exec_prefix, interpreter.parent)):
        command += ["--ro-bind-try", path, path]
    for path in isolation.DEVICES:
        command += ["--dev-bind", path, path]
    command += ["--ro-bind", _HERE, "/sandbox", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*map(str, command), "--", str(interpreter), "-I", "-S", "-B", "/sandbox/supervisor.py"]


def _run(command: Launcher, program: Program, limits: Limits, running: set[subprocess.Popen]) -> Verdict:
    """Returns the verdict on a program; its sandbox is in `running` as long as it may be killed."""
    nonce = secrets.token_hex(16)
    job = {
        "nonce": nonce,
        "program": program.source,
        "tests": program.tests,
        "names": program.names,
        "modules": program.modules,
        "limits": asdict(limits),
    }
    # Neither forks this process nor copies it: with these arguments the new one is started by vfork.
    process = subprocess.Popen(
        command(limits),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    running.add(process)
    try:
        output, errors = process.communicate(json.dumps(job).encode(), timeout=limits.seconds + _START)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"timed out after {limits.seconds:g} s")
    finally:
        running.discard(process)
        if process.returncode is None:
            _kill(process)
            process.communicate()
    try:
        answer = json.loads(output)
    except ValueError:
        said = errors.decode(errors="replace").strip().splitlines()
        return Verdict(False, f"the sandbox ended without a verdict{': ' if said else ''}{''.join(said[-1:])}")
    if "error" in answer:
        return Verdict(False, answer["error"])
    # The reason may quote the program, and hold characters that no file can.
    return Verdict(answer["passed"] and answer["nonce"] == nonce, utf8(answer["reason"]).decode())


def _kill(process: subprocess.Popen) -> None:
    """Kills a sandbox: all its processes die with the first one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
