"""Several processes that run one program, one for each host: who writes, what all must agree on, and how they end.

Every process runs the same schedule on the same records, and process 0 alone writes and prints. What a process could
see differently from another (files that process 0 writes while others look, a seeds file of its own) goes through
`from_primary` and `check_agreement`. Where there is one process, all of this does nothing.

The processes talk through the key-value store of JAX's coordinator, which needs no device and takes texts of any
length. Importing this module does not import jax.
"""

import collections
import contextlib
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
from typing import Any, TypeVar

from etils import epath

from isheep_jax.errors import UserError

T = TypeVar("T")

# How often a process looks whether another has failed (seconds): a host that waits in a collective costs money.
_WATCH = 2.0
# A process that has given no sign of life for so long is gone (seconds). Well below the 100 s after which jax itself
# ends the others, with a stack trace.
_SILENCE = 60.0
# How long a process that failed because another has waits for that one's own words, and process 0, which serves the
# store, for the others to have read its own (seconds).
_LAST_WORDS = 3 * _WATCH
# A shared file system may show a new file late (NFS keeps what it knows of a directory for up to a minute; seconds).
_SHOWN_AFTER = 60.0
# There is no telling how long process 0 takes; that a process is gone is noticed elsewhere (milliseconds).
_ANY_TIME = 7 * 24 * 3600 * 1000

_FAILED = "isheep_jax/failed"
_ALIVE = "isheep_jax/alive"
_READ = "isheep_jax/read"


def is_primary() -> bool:
    """Whether this process writes and prints."""
    return _group is None or _group.index == 0


def is_distributed() -> bool:
    """Whether there are other processes."""
    return _group is not None


def from_primary(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, in every process; all wait for all. It must be JSON-able.

    A `UserError` of `make` is raised in every process.
    """
    return make() if _group is None else _group.from_primary(make)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises `UserError` in every process, naming host and fact, when one of these is not the same everywhere.

    facts: what must agree, by a name that a person knows it by; JSON-able.
    """
    if _group is None:
        return
    everyone = _group.gather({name: json.dumps(value, sort_keys=True) for name, value in facts.items()})
    _group.from_primary(lambda: _compare(everyone, _group.hosts))


def check_shared(directory: epath.PathLike) -> None:
    """Raises `UserError` in every process, naming the hosts that do not see what process 0 writes in `directory`."""
    if _group is None:
        return
    directory = epath.Path(directory)
    token = directory / f".{secrets.token_hex(8)}.tmp"
    token = directory / from_primary(lambda: _written(token))
    seen = _group.gather(_appears(token))

    def judge() -> None:
        token.unlink(missing_ok=True)
        blind = [_group.name(index) for index, sees in enumerate(seen) if not sees]
        if blind:
            raise UserError(
                f"workdir: {directory} is not shared: {', '.join(blind)} cannot read what {_group.name(0)} writes "
                "there; name a directory that every host sees, such as gs://BUCKET/..."
            )

    from_primary(judge)


def code_digest() -> str:
    """sha256 of the package's source files."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


@contextlib.contextmanager
def distributed_session(report_error: Callable[[BaseException], int | None]) -> Iterator[None]:
    """The processes of the cluster that this one was started in act as one inside; without a cluster nothing happens.

    A cluster is a Cloud TPU pod, a step of a SLURM job, an Open MPI job, or what JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe. An error in one process ends all, each with a line that
    names the host, and so does the loss of a process; of process 0, jax tells in its own words. report_error: prints an
    error for a person and returns the exit code, or None for one that needs a traceback. Raises `UserError` when the
    processes do not find each other.
    """
    global _group
    group = _join()
    if group is None:
        yield
        return
    _group = group
    try:
        yield
        group.leave()
    except BaseException as error:
        # Not raised further: at the end of the interpreter jax waits for the others, who may wait for this process.
        group.fail(error, report_error)
    finally:
        _group = None


class _Group:
    """This process among the others."""

    def __init__(self, client, index: int, count: int):
        self.index, self.count = index, count
        self._client = client
        self._calls = 0
        self._ending = threading.Lock()
        self._leaving = threading.Event()
        self.hosts: list[str] = []
        self._show_life()
        self.hosts = self.from_primary_of_all(socket.gethostname())
        self._watcher = threading.Thread(target=self._watch, name="isheep_jax processes", daemon=True)
        self._watcher.start()

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
        answer = json.loads(self._client.blocking_key_value_get(key, _ANY_TIME))
        self._client.wait_at_barrier(key, _ANY_TIME)
        if self.index == 0:
            self._client.key_value_delete(key)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index, in process 0; an empty list in the others."""
        key = self._key()
        self._client.key_value_set(f"{key}/{self.index:06d}", json.dumps(value))
        self._client.wait_at_barrier(key, _ANY_TIME)
        if self.index:
            return []
        entries = sorted(self._client.key_value_dir_get(key + "/"))
        self._client.key_value_delete(key + "/")
        return [json.loads(text) for _, text in entries]

    def from_primary_of_all(self, value: Any) -> list[Any]:
        """The values of all processes, by index, in every process."""
        everyone = self.gather(value)
        return self.from_primary(lambda: everyone)

    def leave(self) -> None:
        """The end of the program, once all have come to it."""
        import jax

        self.from_primary(lambda: None)
        self._leaving.set()
        self._watcher.join()
        jax.distributed.shutdown()

    def fail(self, error: BaseException, report_error: Callable[[BaseException], int | None]) -> None:
        """Ends this process because of `error`, and lets the others know."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            # A collective fails when another process has; that one knows better why, or is found to be gone.
            patience = _LAST_WORDS + (_SILENCE if _may_be_another(error) else 0)
            with contextlib.suppress(Exception):
                self._follow(self._client.blocking_key_value_get(_FAILED, int(1000 * patience)))
        with self._ending:
            code = report_error(error)
            if code is None:
                traceback.print_exception(error)
                code = 1
            words = " ".join(str(error).split()) or "stopped"
            line = words if isinstance(error, UserError) else f"{type(error).__name__}: {words[:300]}"
            self._report(self.index, line, code)
            self._end(code)

    def _report(self, process: int, line: str, code: int) -> None:
        with contextlib.suppress(Exception):  # another was first, or process 0 is gone
            self._client.key_value_set(_FAILED, json.dumps({"process": process, "line": line, "code": code}))

    def _watch(self) -> None:
        signs: dict[str, tuple[str, int]] = {}
        while not self._leaving.wait(_WATCH):
            try:
                self._show_life()
                if self.index == 0:
                    self._look_for_silence(signs)
                failure = self._client.key_value_try_get(_FAILED)
            except Exception as error:
                if "NOT_FOUND" in str(error) or self._leaving.is_set():
                    continue
                with self._ending:
                    print(f"error: {self.name(0)}, which coordinates the others, is gone", file=sys.stderr)
                    _exit(1)
            else:
                self._follow(failure)

    def _show_life(self) -> None:
        if self.index:
            self._client.key_value_set(f"{_ALIVE}/{self.index}", str(time.monotonic()), True)

    def _look_for_silence(self, signs: dict[str, tuple[str, int]]) -> None:
        """Reports, in process 0, a process that shows no life. signs: each one's last, and how often it was seen."""
        for key, sign in self._client.key_value_dir_get(_ALIVE + "/"):
            last, seen = signs.get(key, ("", 0))
            # Looks are counted, not seconds: a machine that was paused must not take the others for gone.
            signs[key] = (sign, seen + 1 if sign == last else 0)
            if signs[key][1] * _WATCH >= _SILENCE:
                line = f"no sign of life for {_SILENCE:.0f} s: killed, preempted or cut off; start every process again"
                self._report(int(key.rpartition("/")[2]), line, 1)

    def _follow(self, failure: str) -> None:
        """Ends this process because another one failed."""
        report = json.loads(failure)
        if report["process"] == self.index:
            return
        with self._ending:
            print(f"error: {self.name(report['process'])}: {report['line']}", file=sys.stderr)
            self._end(report["code"])

    def _end(self, code: int) -> None:
        last = time.monotonic() + _LAST_WORDS
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_READ}/{self.index}", "")
            # The store goes with process 0, so that it waits until the others know why.
            while self.index == 0 and time.monotonic() < last:
                if len(self._client.key_value_dir_get(_READ + "/")) == self.count:
                    break
                time.sleep(0.1)
        _exit(code)

    def _key(self) -> str:
        # All processes run the same schedule, so that they count alike.
        self._calls += 1
        return f"isheep_jax/{self._calls}"


_group: _Group | None = None


def _join() -> _Group | None:
    settings = _cluster(os.environ)
    if settings is None:
        return None
    import jax

    # Public only through functions that compute on devices, which differ where the hosts disagree; Orbax uses it, too.
    from jax._src import distributed

    try:
        jax.distributed.initialize(**settings)
    except Exception as error:
        # A single TPU host need not be able to describe its cluster.
        if settings or jax.process_count() > 1:
            raise UserError(f"the processes do not find each other: {str(error).splitlines()[0]}") from error
    if jax.process_count() == 1:
        return None
    return _Group(distributed.global_state.client, jax.process_index(), jax.process_count())


def _may_be_another(error: BaseException) -> bool:
    """Whether a program may have failed because the devices of another process no longer answer."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None where there is no cluster."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {setting: environment[name] for setting, name in names.items() if name in environment}
    if "JAX_COORDINATOR_ADDRESS" in environment:
        # jax itself reads the address alone; a SLURM job, for example, can tell the rest.
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


def _compare(everyone: list[dict[str, str]], hosts: list[str]) -> None:
    """Raises `UserError` that names the host in the minority and what differs. everyone: facts by process."""
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name, "null") for facts in everyone]
        # Of two processes the first is right.
        (usual, _), *others = collections.Counter(values).most_common()
        if others:
            odd = [index for index, value in enumerate(values) if value != usual]
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise UserError(
                f"host {hosts[odd[0]]} (process {odd[0]} of {len(hosts)}){more} differs in {name}: "
                f"{_short(values[odd[0]])} there, {_short(usual)} on {hosts[values.index(usual)]}; start every process "
                "with the same command, files and installation"
            )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def _written(token: epath.Path) -> str:
    try:
        token.write_text("")
    except OSError as error:
        raise UserError(f"workdir: cannot write {token}: {error.strerror or error}") from error
    return token.name


def _appears(path: epath.Path) -> bool:
    last = time.monotonic() + _SHOWN_AFTER
    while True:
        with contextlib.suppress(OSError):
            # A listing, because that of a directory is renewed sooner than that a name in it is unknown.
            if path.exists() or any(other.name == path.name for other in path.parent.iterdir()):
                return True
        if time.monotonic() > last:
            return False
        time.sleep(1)


def _exit(code: int) -> None:
    # At the interpreter's ordinary end jax would wait for processes that are stuck or gone.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
