"""The smallest runs of every kind on the embedded model, started as commands, and what they must leave."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chat_stand_in import Server, says
from processes import one_device

ROOT = Path(__file__).parents[2]

SETTINGS = (
    "--config=tiny",
    "--iterations=1",
    "--synthesize.instructions=8",
    "--respond.samples=1",
    "--select.fraction=1",
    "--guard.judge=off",
    "--evaluate.limit=8",
    "--sft.epochs=2",
    "--sft.checkpoint_every=1",
    "--sft.warmup_steps=0",
    "--decode.slots=8",
)
LORA = ("--sft.method=lora", "--sft.start=previous", "--iterations=2")
KINDS = {
    "full": (),
    "lora": LORA,
    "adapters alone": (*LORA, "--sft.save=adapter"),
    "cloning": ("--clone.enabled=true",),
    "two turns": ("--synthesize.turns=2",),
    "server judge": ("--assess.read=sampled", "--assess.judge_model=m"),
}
# Lines of the console's log with which the stages of `full` begin.
STAGES = tuple(
    f"iteration {name}"
    for name in ("0 · evaluate", "1 · synthesize", "1 · respond", "1 · assess", "1 · fine-tune", "1 · evaluate")
)


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """Yields the address of a server that judges by the length of what it reads."""
    server = Server(lambda prompt, attempt: says(str(1 + len(prompt) % 10)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class RunCommand:
    """A command line of `train`, without its directory."""

    settings: tuple[str, ...] = ()

    def start(self, directory: Path, **streams) -> subprocess.Popen:
        """Starts it; what it says goes to pipes or to `streams`."""
        command = [sys.executable, "-m", "isheep_jax.train", *SETTINGS, *self.settings, f"--workdir={directory}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=one_device(), text=True, **pipes | streams)

    def finish(self, directory: Path) -> None:
        """Runs it to its end, which must be a good one."""
        process = self.start(directory)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        assert errors == ""


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Reads what a command says, up to a line with the words."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"no line with {words!r}: {process.stderr.read()}")


def results(directory: Path) -> dict[str, bytes]:
    """Returns what a run leaves, by path: all files whose content may not depend on when or how often it was started.

    Left out are the log, what a run measured of its own speed, what says where the directory is, and checkpoints, in
    which Orbax writes the time.
    """
    found = {}
    for place, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "checkpoints"]
        paths = (Path(place, name) for name in names)
        found |= {path.relative_to(directory).as_posix(): path for path in paths}
    # The log may be a device that can be read for ever.
    return {name: _content(name, path.read_bytes()) for name, path in found.items() if name not in _OF_THIS_RUN}


_OF_THIS_RUN = {"log.txt", "config.json"}


def _content(name: str, data: bytes) -> bytes:
    if not name.endswith(("DONE", "fine_tune.json")):
        return data
    value = json.loads(data)
    for measured in ("seconds", "speed"):
        value.pop(measured, None)
    return json.dumps(value).encode()


def instants(seed: int, longest: float) -> Iterator[float]:
    """Yields random durations (s) up to `longest`."""
    numbers = random.Random(seed)
    while True:
        yield numbers.uniform(0, longest)
