"""Multi-host runs, one process per host: who writes, what all processes must agree on, and how a failure ends all.

Every process runs the same schedule on the same records. The primary process (process 0) alone prints, and writes all
but the weights, of which each process writes its own files.
Anything that processes could see differently (files that the primary is writing, a local seeds file) goes through
`from_primary` and `check_agreement`. With a single process all of this does nothing.

The processes communicate through the key-value store of JAX's coordinator, which needs no device and takes strings of
any length. Importing this module does not import jax.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from etils import epath

from isheep_jax.errors import UserError, printable

T = TypeVar("T")

# Interval (s) at which a process sends its heartbeat and checks for failures: waiting in a collective costs money.
_HEARTBEAT_INTERVAL = 2.0
# A process without a heartbeat for this long (s) is considered dead. Well below the 100 s after which jax itself ends
# the other processes, with a stack trace.
_HEARTBEAT_TIMEOUT = 40.0
# Grace period (s) for error messages to travel: a failing process waits for the root cause, and the primary keeps the
# store open.
_GRACE_PERIOD = 3 * _HEARTBEAT_INTERVAL
# Time (s) within which a shared file system shows a new file; NFS caches a directory for up to a minute.
_VISIBLE_WITHIN = 60.0
# Calls that wait for the primary have no deadline of their own: the heartbeats detect a dead process (ms).
_NO_DEADLINE = 7 * 24 * 3600 * 1000

# What helps when a process is lost.
_ALL_AGAIN = "start every process again"

# Keys of the store.
_FAILURE = "isheep_jax/failed"
_HEARTBEATS = "isheep_jax/alive"
_ACKNOWLEDGED = "isheep_jax/read"
_STOP = "isheep_jax/stop"


# Here so that `leave` is whole as soon as it is there: a signal may come while the module is being imported.
_group: "_ProcessGroup | None" = None


def is_primary() -> bool:
    """Returns whether this process writes and prints."""
    return _group is None or _group.index == 0


def is_distributed() -> bool:
    """Returns whether there are other processes."""
    return _group is not None


def process_index() -> int:
    """Returns the number of this process; the primary's is 0."""
    return 0 if _group is None else _group.index


def process_count() -> int:
    """Returns the number of processes."""
    return 1 if _group is None else _group.count


def gather(value: T) -> list[T]:
    """Returns the values of all processes, which must be JSON, in the primary by process; in the others an empty list.

    All processes wait for each other.
    """
    return [value] if _group is None else _group.gather(value)


def wait_for_all() -> None:
    """Returns when every process has called it."""
    from_primary(lambda: None)


def from_primary(make: Callable[[], T]) -> T:
    """Calls `make` in the primary process and returns its result, which must be JSON, in every process.

    All processes wait for each other. A `UserError` of `make` is raised in every process.
    """
    return make() if _group is None else _group.from_primary(make)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises `UserError` in every process, naming host and fact, when a fact is not the same on all hosts.

    facts: JSON values by a name that the user knows.
    """
    if _group is None:
        return
    everyone = _group.gather({name: json.dumps(value, sort_keys=True) for name, value in facts.items()})
    _group.from_primary(lambda: _check_equal(everyone, _group.hosts))


def check_shared(directory: epath.PathLike, setting: str = "workdir") -> None:
    """Raises `UserError` in every process, naming the hosts that cannot see the primary's files in `directory`.

    setting: name of the setting that has the directory, for messages.
    """
    if _group is None:
        return
    directory = epath.Path(directory)
    token = directory / f".{secrets.token_hex(8)}.tmp"
    token = directory / from_primary(lambda: _write_token(token, setting))
    visible = _group.gather(_becomes_visible(token))

    def check() -> None:
        token.unlink(missing_ok=True)
        missing = [_group.name(index) for index, is_visible in enumerate(visible) if not is_visible]
        if missing:
            raise UserError(
                f"{setting}: {directory} is not shared: {', '.join(missing)} cannot read what {_group.name(0)} writes "
                "there; name a directory that every host sees, such as gs://BUCKET/..."
            )

    from_primary(check)


def is_stop_agreed(step: int, is_wanted: bool) -> bool:
    """Returns whether all processes stop before a step of what they do together, because one of them has wanted it.

    All call this before the same steps. Two steps may pass after the call that wants it.
    """
    return is_wanted if _group is None else _group.is_stop_agreed(step, is_wanted)


def leave(say: Callable[[], None], line: str, code: int) -> NoReturn:
    """Ends this process at once, from any of its threads; the others end, too, and show `line` with this one's name.

    say: prints what this process has to say.
    """
    if _group is not None:
        _group.leave(say, line, code)
    say()
    _exit(code)


def code_digest() -> str:
    """Returns the sha256 of the package's source files."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


@contextlib.contextmanager
def distributed_session(report_error: Callable[[BaseException], int | None]) -> Iterator[None]:
    """Joins the processes of the cluster that this process was started in; does nothing without a cluster.

    A cluster is a Cloud TPU pod, a step of a SLURM job, an Open MPI job, or what JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. An error in one process ends all of them, each with a
    line that names the host, and so does the loss of a process; jax itself reports the loss of process 0.

    report_error: prints an error for the user and returns the exit code, or None for one that needs a traceback.
    Raises `UserError` when the processes do not find each other.
    """
    global _group
    group = _join()
    if group is None:
        yield
        return
    _group = group
    try:
        yield
        group.shutdown()
    except BaseException as error:
        # Exits instead of raising: at interpreter exit jax waits for the other processes, which may wait for this one.
        group.fail(error, report_error)
    finally:
        _group = None


class _ProcessGroup:
    """The processes of the cluster, as seen by this one."""

    def __init__(self, client, index: int, count: int):
        self.index, self.count = index, count
        self._client = client
        self._calls = 0
        self._exiting = threading.RLock()
        self._shutting_down = threading.Event()
        self.hosts: list[str] = []
        self._send_heartbeat()
        self.hosts = self.all_gather(socket.gethostname())
        self._watchdog = threading.Thread(target=self._watch, name="isheep_jax watchdog", daemon=True)
        self._watchdog.start()

    def name(self, index: int) -> str:
        return f"{self.hosts[index]} (process {index} of {self.count})"

    def from_primary(self, make: Callable[[], T]) -> T:
        key = self._key()
        if self.index == 0:
            try:
                answer = {"value": make()}
            except UserError as error:
                answer = {"error": str(error)}
            self._client.key_value_set(key, json.dumps(answer))
        answer = json.loads(self._client.blocking_key_value_get(key, _NO_DEADLINE))
        self._client.wait_at_barrier(key, _NO_DEADLINE)
        if self.index == 0:
            self._client.key_value_delete(key)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by index, in the primary; an empty list in the others."""
        key = self._key()
        self._client.key_value_set(f"{key}/{self.index:06d}", json.dumps(value))
        self._client.wait_at_barrier(key, _NO_DEADLINE)
        if self.index:
            return []
        entries = sorted(self._client.key_value_dir_get(key + "/"))
        self._client.key_value_delete(key + "/")
        return [json.loads(text) for _, text in entries]

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by index, in every process."""
        everyone = self.gather(value)
        return self.from_primary(lambda: everyone)

    def is_stop_agreed(self, step: int, is_wanted: bool) -> bool:
        if is_wanted:
            # A step needs all processes, so that those that are ahead see this before they are two steps further. The
            # first one to want it decides.
            with contextlib.suppress(Exception):
                self._client.key_value_set(_STOP, str(step + 2))
        try:
            return step >= int(self._client.key_value_try_get(_STOP))
        except Exception:  # nobody has wanted it, or the primary is gone
            return False

    def shutdown(self) -> None:
        """Ends the session once all processes have come to its end."""
        import jax

        self.from_primary(lambda: None)
        self._shutting_down.set()
        self._watchdog.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException, report_error: Callable[[BaseException], int | None]) -> None:
        """Exits because of `error` and tells the other processes."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # A collective fails when another process does. That process reports the cause, or its heartbeat stops.
            patience = _GRACE_PERIOD + (_HEARTBEAT_TIMEOUT if _may_be_caused_by_another(error) else 0)
            with contextlib.suppress(Exception):
                self._exit_after(self._client.blocking_key_value_get(_FAILURE, int(1000 * patience)))
        with self._exiting:
            code = report_error(error)
            if code is None:
                traceback.print_exception(error)
                code = 1
            message = " ".join(str(error).split()) or "stopped"
            line = message if isinstance(error, UserError) else f"{type(error).__name__}: {message[:300]}"
            self._report(self.index, line, code)
            self._exit_with(code)

    def leave(self, say: Callable[[], None], line: str, code: int) -> NoReturn:
        """Exits, from any thread, and tells the other processes."""
        with self._exiting:
            say()
            self._report(self.index, line, code)
            self._exit_with(code)

    def _report(self, process: int, line: str, code: int) -> None:
        with contextlib.suppress(Exception):  # another process reported first, or the primary is gone
            self._client.key_value_set(_FAILURE, json.dumps({"process": process, "line": line, "code": code}))

    def _watch(self) -> None:
        heartbeats: dict[str, tuple[str, int]] = {}
        while not self._shutting_down.wait(_HEARTBEAT_INTERVAL):
            try:
                self._send_heartbeat()
                if self.index == 0:
                    self._check_heartbeats(heartbeats)
                failure = self._client.key_value_try_get(_FAILURE)
            except Exception as error:
                if "NOT_FOUND" in str(error) or self._shutting_down.is_set():
                    continue
                self.exit_without_primary()
            else:
                self._exit_after(failure)

    def exit_without_primary(self) -> NoReturn:
        """Exits because the store, which is in the primary process, no longer answers."""
        # The thread that has the lock may be waiting for the store.
        if self._exiting.acquire(timeout=1):
            line = f"error: {self.name(0)}, which coordinates the others, is gone; {_ALL_AGAIN}"
            print(printable(line), file=sys.stderr)
        _exit(1)

    def _send_heartbeat(self) -> None:
        if self.index:
            self._client.key_value_set(f"{_HEARTBEATS}/{self.index}", str(time.monotonic()), True)

    def _check_heartbeats(self, heartbeats: dict[str, tuple[str, int]]) -> None:
        """Reports a process whose heartbeat has stopped; the primary calls this.

        heartbeats: last heartbeat of each process, and the number of checks that it has not changed for.
        """
        for key, heartbeat in self._client.key_value_dir_get(_HEARTBEATS + "/"):
            last, unchanged = heartbeats.get(key, ("", 0))
            # Checks are counted, not seconds: after a pause of this machine the other processes are not dead.
            heartbeats[key] = (heartbeat, unchanged + 1 if heartbeat == last else 0)
            if heartbeats[key][1] * _HEARTBEAT_INTERVAL >= _HEARTBEAT_TIMEOUT:
                line = f"no sign of life for {_HEARTBEAT_TIMEOUT:.0f} s: killed, preempted or cut off; {_ALL_AGAIN}"
                self._report(int(key.rpartition("/")[2]), line, 1)

    def _exit_after(self, failure: str) -> None:
        """Exits because another process failed."""
        report = json.loads(failure)
        if report["process"] == self.index:
            return
        with self._exiting:
            print(printable(f"error: {self.name(report['process'])}: {report['line']}"), file=sys.stderr)
            self._exit_with(report["code"])

    def _exit_with(self, code: int) -> None:
        deadline = time.monotonic() + _GRACE_PERIOD
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ACKNOWLEDGED}/{self.index}", "")
            # The store dies with the primary, which therefore waits until the others have read the failure.
            while self.index == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(_ACKNOWLEDGED + "/")) == self.count:
                    break
                time.sleep(0.1)
        _exit(code)

    def _key(self) -> str:
        # All processes run the same schedule, so that their counters agree.
        self._calls += 1
        return f"isheep_jax/{self._calls}"


def _join() -> _ProcessGroup | None:
    settings = _cluster_arguments(os.environ)
    if settings is None:
        return None
    # Unless the user wants to see them: errors of libraries, which follow from the one that is reported here. "1" is
    # what jax itself sets, and what the processes that a program with jax starts inherit.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import jax

    # The public functions compute on devices, which fail if the hosts disagree. Orbax uses this client as well.
    from jax._src import distributed

    # Schedulers end a process with SIGTERM, which jax's service would take for itself and only record.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _own_line_for_lost_primary(distributed._jax):
            jax.distributed.initialize(**settings)
    except Exception as error:
        # A single TPU host may be unable to describe its cluster.
        if settings or jax.process_count() > 1:
            raise UserError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error
    if jax.process_count() == 1:
        return None
    return _ProcessGroup(distributed.global_state.client, jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _own_line_for_lost_primary(library) -> Iterator[None]:
    """Lets clients made in the context end the process with one line when they lose the coordinator.

    Usually they print a stack trace and abort, within milliseconds. They would call a function of Python's instead, but
    jaxlib, up to 0.11 at least, cannot hand it the status: that is an uncaught `std::bad_cast`, and C++ calls a handler
    that can be set. Without libstdc++ all stays as it is.

    library: jax's module of compiled code.
    """
    try:
        standard = ctypes.CDLL("libstdc++.so.6")
        set_handler, exception_type = standard["_ZSt13set_terminatePFvvE"], standard["__cxa_current_exception_type"]
    except (OSError, AttributeError):
        yield
        return
    set_handler.restype, exception_type.restype = ctypes.c_void_p, ctypes.POINTER(ctypes.c_char_p)

    @ctypes.CFUNCTYPE(None)
    def handler() -> None:
        # A `std::type_info`: a pointer to its class, then one to the name.
        kind = exception_type()
        if _group is not None and kind and kind[1] == b"St8bad_cast":
            _group.exit_without_primary()
        ctypes.CFUNCTYPE(None)(usual)()

    usual = set_handler(handler)
    _kept.append(handler)
    make = library.get_distributed_runtime_client
    library.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda status: None)
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make


# Functions that compiled code may call.
_kept: list[Any] = []


def _may_be_caused_by_another(error: BaseException) -> bool:
    """Returns whether a program may have failed because the devices of another process no longer answer."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _cluster_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, or None without a cluster."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {setting: environment[name] for setting, name in names.items() if name in environment}
    if "JAX_COORDINATOR_ADDRESS" in environment:
        # jax itself reads only the address; a SLURM job, for example, provides the rest.
        for setting, value in given.items():
            if not value.isdecimal():
                raise UserError(f"{names[setting]}: {value!r} is not a whole number")
        return {setting: int(value) for setting, value in given.items()}
    if given:
        raise UserError(f"{names[min(given)]} is set, but not JAX_COORDINATOR_ADDRESS, the host:port of process 0")
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"cluster_detection_method": "ompi"}
    has_tpu = any(True for pattern in ("accel*", "vfio/[0-9]*") for _ in Path("/dev").glob(pattern))
    return {} if has_tpu and "tpu" in environment.get("JAX_PLATFORMS", "tpu") else None


def _check_equal(everyone: list[dict[str, str]], hosts: list[str]) -> None:
    """Raises `UserError`, naming host and fact, when the facts of a process differ. everyone: facts by process."""
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name, "null") for facts in everyone]
        # With two processes the first one counts as right.
        (usual, _), *others = collections.Counter(values).most_common()
        if others:
            differing = [index for index, value in enumerate(values) if value != usual]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UserError(
                f"host {hosts[differing[0]]} (process {differing[0]} of {len(hosts)}){more} differs in {name}: "
                f"{_short(values[differing[0]])} there, {_short(usual)} on {hosts[values.index(usual)]}; start every "
                "process with the same command, files and installation"
            )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def _write_token(token: epath.Path, setting: str) -> str:
    """Writes an empty file and returns its name."""
    try:
        token.write_text("")
    except OSError as error:
        raise UserError(f"{setting}: cannot write {token}: {error.strerror or error}") from error
    return token.name


def _becomes_visible(path: epath.Path) -> bool:
    """Waits up to `_VISIBLE_WITHIN` seconds for a file that another host has written."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while True:
        with contextlib.suppress(OSError):
            # NFS renews the listing of a directory sooner than it forgets that a name is missing.
            if path.exists() or any(other.name == path.name for other in path.parent.iterdir()):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(1)


def _exit(code: int) -> NoReturn:
    # A regular interpreter exit would wait for processes that are stuck or gone.
    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    # The reader of a pipe may be stuck as well.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(1)
    os._exit(code)
