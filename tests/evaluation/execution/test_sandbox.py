"""A program passes by right values alone, and leaves nothing behind whatever it does."""

import ctypes
import os
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.execution import sandbox
from isheep_jax.evaluation.execution.sandbox import LIMITS, Limits, Program, Verdict, run_programs

ALLOWED = EvaluateConfig(allow_code_execution=True)
SHORT = Limits(seconds=0.7)
LAUNCHERS = {"namespaces": sandbox._with_namespaces, "bubblewrap": sandbox._with_bubblewrap}
SECRET = "the-secret-of-the-tests"


def skip_if_missing(name: str) -> None:
    """Skips a test on a machine that does not allow this kind of sandbox; a sandbox that is broken fails it."""
    reason = sandbox._why_not(LAUNCHERS[name])
    if re.match("only on|not installed|as root|.*: (Operation not|Permission|No space|Invalid)", reason):
        pytest.skip(f"{name}: {reason}")
    assert not reason


@pytest.fixture(params=LAUNCHERS)
def launcher(request, monkeypatch):
    """Each way to make a sandbox that this machine has."""
    skip_if_missing(request.param)
    monkeypatch.setattr(sandbox, "_launcher", lambda: LAUNCHERS[request.param])


@pytest.fixture(scope="module", autouse=True)
def _a_sandbox_is_needed():
    try:
        sandbox._launcher()
    except UserError:
        for name in LAUNCHERS:
            skip_if_missing(name)


@pytest.fixture(scope="module", autouse=True)
def _adopts_orphans():
    """Processes whose parent ends become children of this one, so that a daemon cannot be overlooked."""
    become_subreaper = 36
    libc = ctypes.CDLL(None)
    libc.prctl(become_subreaper, 1, 0, 0, 0)
    yield
    libc.prctl(become_subreaper, 0, 0, 0, 0)


def descendants() -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def run(source: str, tests: str = "assert answer() == 42", limits: Limits = LIMITS, **names) -> Verdict:
    """Returns the verdict, after a check that no process is left."""
    before = descendants()
    (verdict,) = run_programs([Program(source, tests, **{"names": ("answer",)} | names)], ALLOWED, limits=limits)
    deadline = time.monotonic() + 10  # the kernel may still be ending what a kill has reached
    while descendants() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descendants() <= before
    return verdict


def holds(source: str, tests: str, **names) -> bool:
    """Returns whether what a program reports about its surroundings meets the tests; else fails with the reason."""
    verdict = run(source, tests, **names)
    assert verdict == Verdict(True)
    return verdict.passed


# Programs that a language model may well write.
HONEST = {
    "recursion": "def answer():\n    def depth(n):\n        return n and 1 + depth(n - 1)\n    return depth(900) - 858",
    "memory": "def answer():\n    return len(bytearray(200 << 20)) // (200 << 20) * 42",
    "imports": (
        "import math, re, json, heapq, itertools, functools, string, datetime, random, copy, hashlib, statistics\n"
        "from collections import Counter, defaultdict, deque\nfrom typing import List, Optional\n"
        "def answer() -> Optional[int]:\n    return json.loads('[42]')[0]"
    ),
    "dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def answer():\n    return A(42).x"
    ),
    "printing": "print('hello')\ndef answer():\n    print('x' * 100_000)\n    return 42",
    "main guard": "def answer():\n    return 42\nif __name__ == '__main__':\n    raise SystemExit(1)",
    "temporary file": (
        "def answer():\n    with open('file.txt', 'w') as f:\n        f.write('42')\n"
        "    return int(open('file.txt').read())"
    ),
    "global state": "calls = []\ndef answer():\n    calls.append(1)\n    return 42 * len(calls)",
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(name, launcher):
    assert run(HONEST[name]) == Verdict(True)


VALUES = [
    "None", "True", "-7", "10 ** 500", "0.1", "float('-inf')", "'a\\ud800\\n\"'", "b'\\x00\\xff'", "(1, (2,))", "[]",
    "{1: [2], (3, 4): {'a': None}}", "{1, 2}", "frozenset({(1, 2)})", "1 + 2j", "range(1, 9, 2)", "{'a': 1}.keys()",
]  # fmt: skip


def test_values_pass_between_program_and_tests_unchanged():
    tests = "".join(
        f"assert answer({value}) == {value}\nassert repr(answer({value})) == repr({value})\n" for value in VALUES[:-1]
    )
    tests += "value = answer(float('nan'))\nassert value != value and type(value) is float\n"
    tests += f"assert answer({VALUES[-1]}) == {VALUES[-1]}\n"
    assert run("def answer(x):\n    return x", tests) == Verdict(True)


def test_decimals_and_fractions_are_values():
    tests = "from decimal import Decimal as D\nfrom fractions import Fraction as F\n"
    tests += "assert answer(D('1.10')) == D('1.10') and answer(F(1, 3)) == F(1, 3)"
    assert run("def answer(x):\n    return x", tests) == Verdict(True)


def test_objects_of_the_program_can_be_used_but_equal_only_themselves():
    source = (
        "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None\n"
        "    def __eq__(self, other):\n        return True\n    def __len__(self):\n        return 3\n"
        "def total(node):\n    return node.value + (total(node.next) if node.next else 0)\n"
        "def count():\n    yield from (1, 2)\n"
    )
    tests = (
        "head = Node(1)\nhead.next = Node(41)\nassert total(head) == 42 and head.next.value == 41\n"
        "assert head == head and head != 42 and len(head) == 3 and str(total).startswith('<function')\n"
        "assert list(count()) == [1, 2] and sum(count()) == 3 and next(count()) == 1 and set(count()) == {1, 2}\n"
    )
    assert run(source, tests, names=("Node", "total", "count")) == Verdict(True)


def test_exceptions_of_the_program_reach_the_tests_as_their_built_in_class():
    source = "import json\ndef answer(x):\n    return {}[x] if x else json.loads('{')"
    tests = "for value, kind in ((1, KeyError), (0, ValueError)):\n    try:\n        answer(value)\n    except kind:\n"
    tests += "        continue\n    raise SystemError\n"
    assert run(source, tests) == Verdict(True)
    assert run(source, "answer(1)").reason == "KeyError: '1' in: answer(1)"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def answer():\n    return 41", "wrong: assert answer() == 42"),
        ("def answer(:", "SyntaxError: "),
        ("def another():\n    return 42", "NameError: "),
        ("def answer():\n    return 1 / 0", "ZeroDivisionError: "),
        ("import numpy", "ModuleNotFoundError: "),
        ("def answer():\n    return answer()", "RecursionError: "),
    ],
)
def test_the_reason_says_why_a_program_is_wrong(source, reason):
    verdict = run(source)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)


def test_cpu_time_is_limited_for_each_call_and_for_all():
    source = "import time\ndef answer():\n    end = time.process_time() + 0.4\n    while time.process_time() < end:\n"
    source += "        pass\n    return 42\n"
    assert run(source, "assert answer() == answer() == 42", Limits(call_cpu_seconds=0.7)).passed
    assert run(source, "answer()", Limits(call_cpu_seconds=0.2)).reason.startswith(
        "timed out: a call used more than 0.2 s"
    )
    sleep = "import time\ndef answer():\n    time.sleep(99)"
    assert run(sleep, "answer()", Limits(idle_seconds=0.3)).reason == "timed out: did nothing for 0.3 s"
    tests = "for _ in range(9):\n    answer()"
    assert run(source, tests, Limits(cpu_seconds=1)).reason == "timed out: used more than 1 s of CPU time"


def test_values_that_grow_in_the_tests_are_limited_too():
    for tests in ("list(answer())", "set(answer())", "sorted(answer())"):
        assert run("def answer():\n    return range(10 ** 12)", tests).reason.startswith("MemoryError")


def test_an_endless_generator_is_cut_off():
    source = "def answer():\n    while True:\n        yield 42"
    assert run(source, f"assert len(list(answer())) == {100_000}") == Verdict(True)


# Hostile programs: what they do, and the start of the reason for which they do not pass.
HOSTILE = {
    "exit": ("import sys\nsys.exit(0)", "Raised: SystemExit"),
    "exit in a call": ("def answer():\n    raise SystemExit(0)", "Raised: SystemExit"),
    "exit at once": ("import os\nos._exit(0)", "the program's process ended with exit status 0"),
    "exit at once in a call": (
        "import os\ndef answer():\n    os._exit(0)",
        "the program's process ended with exit status 0",
    ),
    "kill itself": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "the program's process was ended by signal 11 ",
    ),
    "exit handler": (
        "import atexit, os\natexit.register(lambda: os.write(4, b'{\"value\": 42}'))\n"
        "def answer():\n    raise KeyboardInterrupt",
        "Raised: KeyboardInterrupt",
    ),
    "fork bomb": (
        "import os\ndef answer():\n    while True:\n        os.fork()\n",
        # Several processes write into one pipe.
        ("timed out", "BlockingIOError", "the program's process"),
    ),
    "thread bomb": (
        "import threading, time\ndef answer():\n    while True:\n"
        "        threading.Thread(target=time.sleep, args=(99,)).start()",
        "RuntimeError: can't start new thread",
    ),
    "memory": ("def answer():\n    return len(bytearray(1 << 34))", "MemoryError"),
    "memory bit by bit": (
        "def answer():\n    parts = []\n    while True:\n        parts.append(bytearray(1 << 27))",
        "MemoryError",
    ),
    "endless loop": ("def answer():\n    while True:\n        pass", "timed out"),
    "endless loop at the start": ("while True:\n    pass", "timed out"),
    "sleep": ("import time\ntime.sleep(99)", "timed out"),
    "stop itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timed out"),
    "ignore signals": (
        "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass",
        "timed out",
    ),
    "endless output": ("while True:\n    print('x' * 100_000)", "timed out"),
    "endless output to every file": (
        "import os\nwhile True:\n    for fd in range(5):\n        try:\n            os.write(fd, b'x' * 100_000)\n"
        "        except OSError:\n            pass",
        "a value is larger than 64 MiB",
    ),
    "real-time signal": ("import os\nos.kill(os.getpid(), 40)", "the program's process was ended by signal 40 "),
    "value that never ends": (
        "import os, time\nwhile True:\n    os.write(4, b'1')\n    time.sleep(0.01)",
        "timed out",
    ),
    "large value": ("def answer():\n    return 'x' * (1 << 27)", "a value is larger than 64 MiB"),
    "large number": ("def answer():\n    return 1 << 400_000", "the program's process sends malformed values"),
    "nested value": (
        "import os\nos.write(4, b'[' * 60_000 + b'\\n')",
        "the program's process sends malformed values (RecursionError)",
    ),
    "value that contains itself": (
        "def answer():\n    value = []\n    value.append(value)\n    return value",
        ("RecursionError", "the program's process"),
    ),
    "forged values": (
        'import os\nos.write(4, b\'{"object": "x"}\\n\' * 9)',
        "the program's process sends malformed values",
    ),
    "success marker": (
        "import json, os, sys\ntext = json.dumps({'passed': True, 'nonce': '', 'reason': ''})\n"
        "print(text)\nprint(text, file=sys.stderr)\n"
        "for fd in range(3):\n    os.write(fd, text.encode())\nos._exit(0)",
        "the program's process ended with exit status 0",
    ),
    "success marker in the values": (
        "import json, os\nos.write(4, json.dumps({'passed': True, 'nonce': '', 'reason': ''}).encode() + b'\\n')\n"
        "def answer():\n    return 41",
        "the program's process sends malformed values",
    ),
    "closed files": ("import os\nos.closerange(0, 99)\ndef answer():\n    return 42", "the program's process"),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other):\n        return True\n    __ne__ = lambda *_: False\n"
        "def answer():\n    return Any()",
        "wrong: assert answer() == 42",
    ),
    "number equal to everything": (
        "class Any(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\n"
        "def answer():\n    return Any(41)",
        "wrong: assert answer() == 42",
    ),
    "patched built-ins": (
        "import builtins, sys\nbuiltins.AssertionError = None\nbuiltins.exec = lambda *a, **k: None\n"
        "builtins.int = builtins.isinstance = lambda *a: 42\nsys.excepthook = lambda *a: None\n"
        "def answer():\n    return 41",
        "",
    ),
    "patched supervisor": (
        "import sys\nsys.path.append('/sandbox')\nsys.modules['program'] = sys.modules['__main__']\nimport supervisor\n"
        "supervisor.verdict = lambda job: ''\nsupervisor.main = supervisor._reason = lambda *a: ''\n"
        "def answer():\n    return 41",
        "wrong: assert answer() == 42",
    ),
    "patched host": (
        "import sys\nhost = sys.modules['__main__']\ndef answer():\n"
        "    host.Codec.encode = lambda self, value: {'object': 0}\n    return 41",
        "wrong: assert answer() == 42",
    ),
    "trace function": (
        "import sys\ndef trace(frame, event, argument):\n    return trace\n"
        "sys.settrace(trace)\nsys.setprofile(trace)\ndef answer():\n    return 41",
        "wrong: assert answer() == 42",
    ),
    "exception that cannot be printed": (
        "class Bad(AssertionError):\n    def __str__(self):\n        raise Bad\ndef answer():\n    raise Bad",
        "the program's process ended with exit status 1",
    ),
    "reads standard input": ("answer = lambda: input() or 42", "EOFError"),
    "removes its directory": (
        "import os, shutil\nshutil.rmtree('/tmp', ignore_errors=True)\nshutil.rmtree('/sandbox', ignore_errors=True)\n"
        "def answer():\n    return open('file', 'w').write('x')",
        "wrong: assert answer() == 42",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_pass_and_no_process_is_left(name, launcher):
    source, reasons = HOSTILE[name]
    verdict = run(source, limits=SHORT if "timed out" in reasons else LIMITS)
    assert not verdict.passed
    assert verdict.reason.startswith(reasons)


def test_a_daemon_dies_with_its_program(launcher):
    source = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in range(5):\n"
        "            os.close(fd)\n        while True:\n            time.sleep(0.01)\n    os._exit(0)\n"
        "os.wait()\ndef answer():\n    return 42"
    )
    assert holds(source, "assert answer() == 42")  # `run` has looked for what is left


def test_the_number_of_processes_is_limited(launcher):
    source = (
        "import os, time\ndef answer():\n    for n in range(1000):\n        try:\n            if not os.fork():\n"
        "                time.sleep(99)\n                os._exit(0)\n"
        "        except BlockingIOError:\n            return n\n"
    )
    assert holds(source, f"assert answer() <= {LIMITS.processes + 1}")


def test_files_are_written_only_to_the_private_directory(launcher, tmp_path):
    name = f"isheep-jax-{os.getpid()}-hostile"
    directories = ["/", "/dev/shm", "/var/tmp", "/etc", "/usr", "/sandbox", str(Path.home()), str(Path.cwd())]
    directories += [str(tmp_path), str(Path(sandbox.__file__).parent), str(Path(sandbox._interpreter()).parent), ".."]
    source = (
        "import os\ndef written(directories, name):\n    done = []\n    for directory in directories:\n        try:\n"
        "            with open(os.path.join(directory, name), 'w') as file:\n                file.write('x')\n"
        "            done.append(directory)\n        except OSError:\n            pass\n    return done\n"
    )
    tests = f"assert written({[*directories, '/tmp']!r}, {name!r}) == ['/tmp']"
    assert holds(source, tests, names=("written",))
    assert not [path for path in (*directories, "/tmp") if Path(path, name).exists()]


def test_links_do_not_lead_out_of_the_private_directory(launcher, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    source = (
        "import os\ndef attempt(directory):\n    os.symlink(directory, 'link')\n    results = []\n"
        "    for action in (lambda: open('link/secret').read(), lambda: open('link/new', 'w').write('x'),\n"
        "                   lambda: os.link('link/secret', 'hard'), lambda: os.rename('link', '/usr/link')):\n"
        "        try:\n            results.append(action())\n        except OSError:\n            pass\n"
        "    return results\n"
    )
    assert holds(source, f"assert attempt({str(tmp_path)!r}) == []", names=("attempt",))
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_the_disk_is_limited(launcher):
    source = (
        "import os\ndef answer():\n    total = 0\n    for n in range(1000):\n        try:\n"
        "            with open(f'f{n}', 'wb', buffering=0) as file:\n"
        "                total += file.write(bytes(1 << 20))\n        except OSError:\n            return total\n"
        "def one():\n    with open('one', 'wb', buffering=0) as file:\n        while True:\n"
        "            file.write(bytes(1 << 20))\n"
    )
    assert holds(source, f"assert answer() <= {LIMITS.disk}")
    assert run(source, "one()", names=("one",)).reason.startswith("OSError: [Errno 27] File too large")


def test_memory_that_counts_for_no_process_cannot_be_had(launcher):
    source = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef had():\n"
        "    calls = {'shared memory': lambda: libc.shmget(0, 4096, 0o1600),\n"
        "             'messages': lambda: libc.msgget(0, 0o1600), 'semaphores': lambda: libc.semget(0, 9, 0o1600),\n"
        "             'file': lambda: libc.memfd_create(b'x', 0),\n"
        "             'message queue': lambda: libc.mq_open(b'/x', os.O_CREAT | os.O_RDWR, 0o600, None)}\n"
        "    return [name for name, call in calls.items() if call() != -1]\n"
    )
    assert holds(source, "assert had() == []", names=("had",))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has a second set of numbers")
def test_system_calls_have_no_other_numbers_that_are_allowed(launcher):
    source = (
        "import ctypes, errno\ndef answer():\n    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    return libc.syscall(29 | 1 << 30, 0, 4096, 0o1600), errno.errorcode[ctypes.get_errno()]\n"
    )
    assert holds(source, "assert answer() == (-1, 'EPERM')")


def test_a_reason_can_be_written_to_a_file():
    reason = run("def answer():\n    raise ValueError('\\ud800')").reason
    assert reason.startswith("ValueError: ?")
    assert reason.encode()


def test_nothing_of_the_parent_can_be_seen(launcher, monkeypatch):
    monkeypatch.setenv("ISHEEP_JAX_SECRET", SECRET)
    source = (
        "import glob, os, sys\ndef seen():\n    texts = [str(dict(os.environ)), str(sys.argv)]\n"
        "    for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline') + ['/dev/mem']:\n"
        "        try:\n            texts.append(open(path, 'rb').read().decode('latin-1'))\n"
        "        except OSError:\n            pass\n    return texts\n"
        "def processes():\n    return [n for n in range(1, 100_000) if n != os.getpid() and exists(n)]\n"
        "def exists(n):\n    try:\n        os.kill(n, 0)\n    except ProcessLookupError:\n        return False\n"
        "    except PermissionError:\n        pass\n    return True\n"
    )
    # The interpreter itself sets LC_CTYPE where there is no locale.
    tests = f"assert {SECRET!r} not in str(seen())\nassert seen()[0] == \"{{'LC_CTYPE': 'C.UTF-8'}}\"\n"
    assert holds(source, tests + "assert processes() == [1]\n", names=("seen", "processes"))


def test_files_of_the_machine_cannot_be_read(launcher, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    paths = ["/home", "/etc/passwd", "/var", "/proc", "/sys", "/dev/shm", "/dev/kmsg", str(tmp_path), str(Path.cwd())]
    source = "import os\ndef there(paths):\n    return [path for path in paths if os.path.exists(path)]"
    assert holds(source, f"assert there({paths!r}) == []", names=("there",))


def test_tests_and_nonce_are_not_in_the_process_of_the_program(launcher):
    # Searches every object, frame, argument and inherited file, and all of the process's memory that it can find.
    source = (
        "import gc, os, sys\ndef search(parts):\n    wanted = ''.join(parts)\n    found = []\n"
        "    for thing in gc.get_objects():\n        try:\n            text = repr(thing)\n"
        "        except Exception:\n            continue\n        found += [text] * (wanted in text)\n"
        "    frame = sys._getframe()\n    while frame:\n        found += [str(v) for v in frame.f_locals.values()\n"
        "                  if wanted in str(v) and v is not wanted]\n"
        "        found += [str(c) for c in frame.f_code.co_consts if wanted in str(c)]\n        frame = frame.f_back\n"
        "    for fd in range(64):\n        try:\n            os.set_blocking(fd, False)\n"
        "            found += ['file'] * (wanted.encode() in os.read(fd, 1 << 20))\n"
        "        except OSError:\n            pass\n"
        "    return [text for text in found if text != wanted]\n"
    )
    tests = f"# {SECRET}\nassert search({list(SECRET)!r}) == []"
    assert holds(source, tests, names=("search",))


def test_the_supervisor_cannot_be_killed_traced_or_read(launcher):
    source = (
        "import ctypes, errno, os, signal\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def kill():\n    for target in (os.getppid(), 1, -1):\n        for s in range(1, 65):\n"
        "            try:\n                os.kill(target, s)\n            except OSError:\n"
        "                pass\n    return 'done'\n"
        "def trace():\n    results = []\n    for attach in (16, 0x4206):\n        ctypes.set_errno(0)\n"
        "        libc.ptrace(attach, os.getppid(), 0, 0)\n        results.append(errno.errorcode[ctypes.get_errno()])\n"
        "    class Part(ctypes.Structure):\n        _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]\n"
        "    buffer = ctypes.create_string_buffer(8)\n    local = Part(ctypes.addressof(buffer), 8)\n"
        "    remote = Part(0x400000, 8)\n    ctypes.set_errno(0)\n"
        "    libc.process_vm_readv(os.getppid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)\n"
        "    return results + [errno.errorcode[ctypes.get_errno()]]\n"
    )
    tests = "assert set(trace()) <= {'EPERM', 'ESRCH'}\nassert kill() == 'done'\nassert kill() == 'done'"
    assert holds(source, tests, names=("kill", "trace"))


def test_the_program_has_no_rights_and_gets_none(launcher):
    source = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef attempts():\n"
        "    calls = {'users': lambda: libc.unshare(0x10000000), 'mounts': lambda: libc.unshare(0x20000),\n"
        "             'mount': lambda: libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None),\n"
        "             'remount': lambda: libc.mount(None, b'/usr', None, 32 | 4096, None),\n"
        "             'unmount': lambda: libc.umount2(b'/usr', 2), 'chroot': lambda: libc.chroot(b'/tmp'),\n"
        "             'name': lambda: libc.sethostname(b'x', 1), 'root': lambda: libc.setresuid(0, 0, 0),\n"
        "             'limit': lambda: libc.prlimit(0, 7, (ctypes.c_ulong * 2)(9999, 9999), None)}\n"
        "    return [name for name, call in calls.items() if call() == 0]\n"
        "def who():\n    return os.getresuid() + os.getresgid()"
    )
    tests = "assert attempts() == []\nassert who() == (65534,) * 6"
    assert holds(source, tests, names=("attempts", "who"))


def test_there_is_no_network(launcher):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        abstract = f"\0isheep-jax-{os.getpid()}"
        local.bind(abstract)
        local.listen()
        for listener in (server, local):
            listener.setblocking(False)
        port = server.getsockname()[1]
        source = (
            "import socket\ndef reached(addresses):\n    found = []\n    for family, address in addresses:\n"
            "        try:\n            with socket.socket(family) as s:\n                s.settimeout(0.3)\n"
            "                s.connect(address)\n                found.append(address)\n"
            "        except OSError:\n            pass\n    return found\n"
            "def resolved():\n    try:\n        return socket.gethostbyname('example.com')\n"
            "    except OSError:\n        return None\n"
            "def own():\n    try:\n        server = socket.create_server(('127.0.0.1', 0))\n"
            "        socket.create_connection(server.getsockname(), 0.3)\n        return True\n"
            "    except OSError:\n        return False\n"
        )
        addresses = [(2, ("127.0.0.1", port)), (2, ("192.0.2.1", 80)), (10, ("::1", port)), (1, abstract)]
        tests = f"assert reached({addresses!r}) == []\nassert resolved() is None"
        assert holds(source, tests, names=("reached", "resolved"))
        for listener in (server, local):
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_modules_that_the_tests_use_are_the_real_ones():
    source = (
        "import math\nmath.isclose = lambda *a, **k: True\nmath.fabs = lambda x: 0.0\ndef answer():\n    return 41\n"
    )
    verdict = run(source, "assert math.isclose(answer(), 42)", modules=("math",))
    assert verdict.reason == "wrong: assert math.isclose(answer(), 42)"
    assert run(source.replace("41", "42"), "assert math.isclose(answer(), 42)", modules=("math",)).passed
    # As the official scorers have it, a program must import what its tests need.
    assert run("def answer():\n    return 42", "math.isclose(1, 1)", modules=("math",)).reason.startswith("NameError")
    pretended = "class math:\n    isclose = lambda *a: True\ndef answer():\n    return 41"
    assert run(pretended, "assert math.isclose(answer(), 42)", modules=("math",)).reason.startswith("NameError")


def test_names_that_the_tests_do_not_expect_are_not_taken():
    source = "abs = len = isinstance = lambda *a: 0\ndef answer():\n    return 41"
    assert run(source, "assert abs(answer() - 42) < 1e-6").reason == "wrong: assert abs(answer() - 42) < 1e-6"


def test_tests_that_catch_everything_do_not_hide_a_failure():
    tests = "try:\n    answer()\nexcept BaseException:\n    pass\n"
    assert run("import os\ndef answer():\n    os._exit(0)", tests).reason.startswith("the program's process ended")


def test_only_the_nonce_proves_that_a_program_passed(monkeypatch):
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda n: "right")
    said = '{"passed": true, "nonce": "%s", "reason": ""}'
    for nonce, passed in (("right", True), ("", False), ("wrong", False)):
        script = f"cat > /dev/null; echo '{said % nonce}'"
        verdict = sandbox._run(
            lambda limits, script=script: ["/bin/sh", "-c", script], Program("", "", ()), LIMITS, set()
        )
        assert verdict.passed == passed


def test_verdicts_come_in_the_order_of_the_programs_and_each_is_counted():
    programs = [Program(f"def answer():\n    return {n}", "assert answer() % 2 == 0", ("answer",)) for n in range(6)]
    counted = []
    verdicts = run_programs(programs, ALLOWED, lambda: counted.append(threading.get_ident()))
    assert [v.passed for v in verdicts] == [True, False] * 3
    assert counted == [threading.get_ident()] * 6


def test_an_interruption_ends_the_programs_that_are_running(monkeypatch):
    killed = []
    kill = sandbox._kill
    monkeypatch.setattr(sandbox, "_kill", lambda process: (killed.append(process.pid), kill(process)))

    class Interrupted(BaseException):
        pass

    def interrupt():
        raise Interrupted

    before = descendants()
    quick, endless = (Program(source, "", ()) for source in ("", "import time\ntime.sleep(99)"))
    with pytest.raises(Interrupted):
        run_programs([quick, endless], ALLOWED, interrupt, Limits(seconds=60.0))
    assert len(killed) == 1
    deadline = time.monotonic() + 10
    while descendants() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descendants() <= before


def test_programs_run_only_where_the_user_allows_it():
    with pytest.raises(UserError, match=r"--evaluate\.allow_code_execution"):
        run_programs([Program("", "", ())], EvaluateConfig())


def test_a_machine_without_a_sandbox_is_refused_with_the_reasons(monkeypatch):
    sandbox._launcher.cache_clear()
    monkeypatch.setattr(sandbox, "_why_not", lambda command: "not permitted")
    with pytest.raises(UserError, match="namespaces: not permitted; bubblewrap: not permitted"):
        run_programs([], ALLOWED)
    sandbox._launcher.cache_clear()


def test_bubblewrap_is_taken_where_namespaces_are_refused(monkeypatch):
    why_not = sandbox._why_not
    skip_if_missing("bubblewrap")
    sandbox._launcher.cache_clear()
    monkeypatch.setattr(sandbox, "_why_not", lambda c: "no" if c is sandbox._with_namespaces else why_not(c))
    assert sandbox._launcher() is sandbox._with_bubblewrap
    sandbox._launcher.cache_clear()
