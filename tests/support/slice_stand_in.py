"""A stand-in for a TPU slice: a fake gcloud that runs the commands for the workers on this machine."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
STAND_IN = Path(__file__).parents[1] / "tpu_scripts" / "stand_in"


class Slice:
    """Runs the scripts against the stand-in, whose answers are set by files; see `stand_in/gcloud`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {
            "PATH": f"{STAND_IN}:{os.environ['PATH']}",
            "HOME": str(directory / "laptop"),
            "ISHEEP_POLL_SECONDS": "0.02",
            "ISHEEP_BACKOFF_SECONDS": "0",
            "ISHEEP_STOP_SECONDS": "3",
            "STAND_IN": str(directory),
        }
        (directory / "laptop").mkdir()
        self.set(calls="", states="", node_state="READY\n", on_create="WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
        self.set(
            workers="2\n", type="v4-16\n", devices="8\n", creations="0\n", project="my-project\n", zone="my-zone\n"
        )
        self.set(program="echo program $*\n")

    def set(self, **files: str) -> None:
        for name, text in files.items():
            (self.directory / name).write_text(text)

    def command(self, script: str, *arguments: str) -> list[str]:
        return ["bash", str(SCRIPTS / script), *arguments]

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        """Runs a script and asserts its exit code."""
        result = subprocess.run(
            self.command(script, *arguments),
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
        return result

    def dry_run(self, script: str, *arguments: str, **environment: str) -> list[list[str]]:
        """Returns the gcloud commands that a dry run prints, without the word gcloud, and asserts that nothing ran."""
        before = self.calls()
        name, *rest = arguments
        lines = self.run(script, name, "--dry-run", *rest, **environment).stdout.splitlines()
        assert self.calls() == before
        return [shlex.split(line)[1:] for line in lines if line.startswith("gcloud ")]

    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.directory / "calls").read_text().splitlines()]

    def commands(self) -> list[list[str]]:
        """Returns the calls about the slice, without those that read gcloud's configuration."""
        return [call for call in self.calls() if call[0] != "config"]

    def verbs(self) -> list[str]:
        """Returns what happened to the slice in order: create, delete, and the commands of the workers."""
        verbs = []
        for call in self.commands():
            remote = [word for word in call if word.startswith("--command=bash isheep_jax/worker.sh")]
            if remote:
                verbs.append(remote[0].split()[2])
            elif call[-1].startswith("--command=") or "describe" in call:
                continue
            else:
                verbs.append(next(word for word in call if word in {"create", "delete", "scp"}))
        return verbs

    def worker(self, number: int) -> Path:
        return self.directory / "home" / str(number) / "isheep_jax"

    def log(self, number: int) -> str:
        return (self.worker(number) / "current" / "log.txt").read_text()

    def ready(self) -> None:
        """Makes the slice active, as install.sh leaves it."""
        self.set(states="ACTIVE\n")
        for number in range(2):
            worker = self.worker(number)
            worker.mkdir(parents=True)
            shutil.copy(SCRIPTS / "worker.sh", worker)
            environment = self.environment | {"ISHEEP_WORKER": str(number)}
            subprocess.run([STAND_IN / "uv", "venv"], cwd=worker, env=environment, check=True)

    def close(self) -> None:
        for pid in self.directory.glob("home/*/isheep_jax/runs/*/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
