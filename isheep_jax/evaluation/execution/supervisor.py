"""Runs inside the sandbox, as the trusted process: tests a program that runs in a process of its own.

Reads a job (see `sandbox.py`) from standard input and prints the verdict, with the job's nonce if all tests passed. The
tests run here. Where they use a name of the program they get a `Remote`, which asks the program's process; what comes
back is data. So the program never shares a process with the tests, the nonce or the channel of the verdict: it can
neither read nor change them, and passes only by returning right values.
"""

import builtins
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import struct
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))

from isolation import NOBODY
from program import Codec

MAX_MESSAGE = 64 << 20  # bytes
CLOCK_OF_PROCESS = 2  # in the number of a clock, see clock_getcpuclockid(3)
BUSY = 0.02  # seconds of CPU time that a process which is not idle uses, also on a busy machine
MAX_DIGITS = 100_000  # of an integer; reading one takes time that grows with the square
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER, SECCOMP_ALLOW, SECCOMP_ERROR = 2, 0x7FFF0000, 0x50000
# By machine, its number in seccomp's data and those of the system calls that make memory which no limit counts: shmget,
# semget, msgget, mq_open, memfd_create, memfd_secret.
FORBIDDEN_CALLS = {
    "x86_64": (0xC000003E, (29, 64, 68, 240, 319, 447)),
    "aarch64": (0xC00000B7, (194, 190, 186, 180, 279, 447)),
}
X32_CALLS = 1 << 30  # where a second set of numbers begins on x86_64


class Failed(BaseException):
    """The program does not pass, whatever the tests make of its exceptions. The message is the reason."""


class Raised(Exception):
    """An exception of the program whose class is not built in, or cannot be made from a message."""


class Remote:
    """An object in the program's process.

    Two are equal only if they are the same one: the program shall not decide that something equals the right answer.
    """

    __slots__ = ("_number", "_process")

    def __init__(self, number, process):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_process", process)

    def _do(self, operation, *arguments):
        return self._process.do(operation, self, *arguments)

    def __call__(self, *arguments, **keywords):
        return self._do("call", arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle ask for such names
            raise AttributeError(name)
        return self._do("get", name)

    def __setattr__(self, name, value):
        self._do("set", name, value)

    def __iter__(self):
        return iter(self._do("items"))

    def __next__(self):
        return self._do("next")

    def __getitem__(self, key):
        return self._do("item", key)

    def __len__(self):
        return self._do("len")

    def __bool__(self):
        return self._do("bool")

    def __str__(self):
        return self._do("str")


class Process:
    """The program's process and the pipes to it."""

    def __init__(self, limits):
        self._limits = limits
        self._call_limit = limits["call_cpu_seconds"]
        self._deadline = time.monotonic() + limits["seconds"]
        request_reader, self._requests = os.pipe()
        self._replies, reply_writer = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            _become_program(request_reader, reply_writer, limits)
        os.close(request_reader)
        os.close(reply_writer)
        os.set_blocking(self._requests, False)
        self._codec = Codec(_number_of, lambda number: Remote(int(number), self))
        self.failure = ""

    def load(self, job):
        """Executes the program. Returns the values of the job's names, and which of its modules the program has."""
        return self._exchange({name: job[name] for name in ("program", "names", "modules")})

    def limit_calls(self, seconds):
        """Sets how much CPU time each further call may use."""
        self._call_limit = seconds

    def do(self, operation, *arguments):
        """Returns the result of an operation in the program's process, or raises its exception."""
        try:
            encoded = [self._codec.encode(argument) for argument in arguments]
        except TypeError as error:
            self._fail(f"a test passes something that cannot be sent to the program: {error}")
        return self._exchange([operation, encoded])

    def _exchange(self, request):
        self._cpu_limit = self._cpu_time() + self._call_limit
        self._busy = time.monotonic(), self._cpu_time()
        self._send(json.dumps(request).encode() + b"\n")
        message = self._receive()
        raised = None
        try:
            reply = json.loads(message)
            if "raised" in reply:
                raised = _exception(*map(str, reply["raised"]))
            else:
                value = self._codec.decode(reply["value"])
        except Exception as error:  # the program wrote into the pipe itself
            self._fail(f"the program's process sends malformed values ({type(error).__name__})")
        if raised is not None:
            raise raised
        return value

    def _send(self, message):
        view = memoryview(message)
        while view:
            self._wait([], [self._requests])
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._fail(self._end())

    def _receive(self):
        message = bytearray()
        while not message.endswith(b"\n"):
            self._wait([self._replies], [])
            part = os.read(self._replies, 1 << 20)
            if not part:
                self._fail(self._end())
            message += part
            if len(message) > MAX_MESSAGE:
                self._fail(f"a value is larger than {MAX_MESSAGE >> 20} MiB")
        return message

    def _wait(self, readers, writers):
        """Waits for a pipe, within the limits on time."""
        while True:
            ready = any(select.select(readers, writers, [], 0.1))
            if time.monotonic() > self._deadline:
                self._fail(f"timed out after {self._limits['seconds']:g} s")
            if ready:
                return
            cpu_time = self._cpu_time()
            if cpu_time > self._cpu_limit:
                self._fail(f"timed out: a call used more than {self._call_limit:g} s of CPU time")
            if cpu_time > self._busy[1] + BUSY:
                self._busy = time.monotonic(), cpu_time
            if time.monotonic() > self._busy[0] + self._limits["idle_seconds"]:
                self._fail(f"timed out: did nothing for {self._limits['idle_seconds']:g} s")

    def _cpu_time(self):
        """Returns how many seconds of CPU time the program's process has used; 0 after its end."""
        try:
            return time.clock_gettime((~self._pid << 3) | CLOCK_OF_PROCESS)
        except OSError:
            return 0.0

    def _end(self):
        """Returns how the program's process ended."""
        patience = time.monotonic() + 1.0
        ended, status = os.waitpid(self._pid, os.WNOHANG)
        while not ended and time.monotonic() < patience:
            time.sleep(0.01)
            ended, status = os.waitpid(self._pid, os.WNOHANG)
        if not ended:
            return "the program's process closed its channel"
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            return f"timed out: used more than {self._limits['cpu_seconds']} s of CPU time"
        if code < 0:
            return f"the program's process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"the program's process ended with exit status {code}"

    def _fail(self, reason):
        self.failure = self.failure or reason
        raise Failed(reason)


def _number_of(value):
    """Returns the number of an object in the program's process."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a value of type {type(value).__name__}")


def _exception(builtin, name, text):
    """Returns an exception of the built-in class, which tests may expect."""
    kind = getattr(builtins, builtin, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:
            pass
    return Raised(f"{name}: {text}")


def _become_program(request_reader, reply_writer, limits):
    """Replaces this process by the program's: another interpreter without rights that sees only its two pipes."""
    try:
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (request_reader, reply_writer)]
        null = os.open("/dev/null", os.O_RDWR)
        for number, fd in enumerate((null, null, null, *fds)):
            os.dup2(fd, number)
        os.closerange(5, 1024)
        os.chdir("/tmp")
        for name, value in {
            "AS": limits["memory"],
            "CPU": limits["cpu_seconds"],
            "FSIZE": limits["file_size"],
            "NOFILE": limits["open_files"],
            "CORE": 0,
            "MSGQUEUE": 0,
            # Two processes besides the program's may count, as they may belong to the same user.
            "NPROC": limits["processes"] + 2,
        }.items():
            # A second after the first limit on CPU time, which can be ignored, comes the hard one.
            hard = value + 1 if name == "CPU" else value
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
        if os.getuid() == 0:
            os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _forbid_calls()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        host = os.path.join(os.path.dirname(os.path.abspath(__file__)), "program.py")
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", host], {})
    finally:
        os._exit(1)


def _forbid_calls():
    """Has the system calls of `FORBIDDEN_CALLS` fail in this process and its children; not on other machines."""
    machine = os.uname().machine
    if machine not in FORBIDDEN_CALLS or sys.maxsize < 1 << 32:  # an interpreter of 32 bits makes other calls
        return
    architecture, numbers = FORBIDDEN_CALLS[machine]
    load, jump_if_equal, jump_if_at_least, end = 0x20, 0x15, 0x35, 0x06
    forbid = 5 + len(numbers)  # index of the last instruction; jumps count from the next one
    instructions = [
        (load, 0, 0, 4),  # the architecture
        (jump_if_equal, 0, forbid - 2, architecture),
        (load, 0, 0, 0),  # the number of the call
        (jump_if_at_least, forbid - 4, 0, X32_CALLS),
        *((jump_if_equal, forbid - index - 1, 0, number) for index, number in enumerate(numbers, 4)),
        (end, 0, 0, SECCOMP_ALLOW),
        (end, 0, 0, SECCOMP_ERROR | errno.EPERM),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def _prctl(option, value, address=None):
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, ctypes.c_void_p(address), 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def verdict(job):
    """Returns why the program of a job does not pass its tests; "" if it does."""
    process = Process(job["limits"])
    scope = {"__name__": "tests", "limit_calls": process.limit_calls}
    try:
        found = process.load(job)
        scope.update((name, found["names"][name]) for name in job["names"] if name in found["names"])
        # Imported here, not taken from the program, which could have changed them.
        scope.update((name, __import__(name)) for name in job["modules"] if name in found["modules"])
        exec(compile(job["tests"], "tests", "exec", dont_inherit=True), scope)
    except BaseException as error:
        return process.failure or _reason(error, job["tests"])
    return process.failure


def _reason(error, tests):
    """Returns one line about a failed test."""
    import traceback  # here, as it takes a while and most programs may need none

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
    line = tests.splitlines()[lines[-1] - 1].strip() if lines else ""
    if len(line) > 200:  # a line of data
        line = ""
    if isinstance(error, AssertionError):
        return f"wrong: {line or error}"
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{text} in: {line}" if line else text


def main():
    # Nobody reads this process's memory through the system, such as the program by ptrace, or interrupts it: as the
    # first process of its namespace it gets no other signal from within.
    _prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.set_int_max_str_digits(MAX_DIGITS)
    job = json.load(sys.stdin)
    # A small value can become a large one here, such as the list of a range.
    resource.setrlimit(resource.RLIMIT_AS, (job["limits"]["memory"],) * 2)
    reason = verdict(job)
    answer = {"passed": not reason, "reason": reason, "nonce": "" if reason else job["nonce"]}
    os.write(1, json.dumps(answer).encode())
    os._exit(0)  # as the first process of its namespace; its end ends all others


if __name__ == "__main__":
    main()
