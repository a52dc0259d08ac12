"""The command that copies a run's model or adapter to a directory of its own, with a card that describes its lineage.

python -m isheep_jax.export runs/tiny my-model
"""

import contextlib
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.cli.output import show
from isheep_jax.directory_lock import owner_of
from isheep_jax.errors import UserError, quoted
from isheep_jax.files import check_new_directory, check_seal, full_path, is_there, read_json
from isheep_jax.loop import made_models
from isheep_jax.loop.card import Step, lineage_card
from isheep_jax.loop.stages.evaluate import read_results
from isheep_jax.runtime.locate import finished_models
from isheep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from etils import epath

_CARD = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
# What mends a damaged file of a run that only the run could write.
_RESTORE = "restore it, or run its command again"
# Bytes copied at a time: large enough for object stores, small enough for any host.
_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command."""

    run: str = ""
    """Directory of a run."""
    output: str = ""
    """Directory to write, which must not exist: a local path or gs://bucket/path."""
    iteration: int = -1
    """Iteration whose model to copy (1 and up). -1: the newest that is finished."""
    adapter: bool = False
    """Copy what LoRA learned as a PEFT adapter directory, instead of the merged model."""


COMMAND = Command(
    module="isheep_jax.export",
    options=ExportOptions,
    usage=("RUN OUTPUT [--iteration=N] [--adapter]",),
    about="Copies the model of a run's iteration to OUTPUT, a directory in Hugging Face format, with a model card.",
    example="runs/tiny my-model",
    positional=("run", "output"),
    required=("run", "output"),
    ranges={"iteration": "[-1, inf)"},
)


def main(arguments: Sequence[str]) -> None:
    """Copies one iteration's model, or its adapter. Raises `UserError` for bad input, before anything is written."""
    options = COMMAND.parse(arguments)
    from etils import epath

    try:
        run, output = (epath.Path(path).expanduser() for path in (options.run, options.output))
        settings, digest = _settings(run)
        number = _iteration(run, options.iteration)
        source = _source(run, number, settings["sft"]["method"], options.adapter)
        check_new_directory("--output", output)
        steps = [_step(run, n) for n in range(number + 1)]
        environment = run / "environment.json"
        versions = _read(environment) if environment.exists() else {}
        card = lineage_card(settings, digest, versions, steps, options.adapter, _judge_check(run, number))
        if options.adapter:
            adapter_config = _adapter_config(run, source)
            note = _base_note(adapter_config["base_model_name_or_path"])
            text = card if note is None else f"{card}\n{note}\n"
            config = (json.dumps(adapter_config, indent=2) + "\n").encode()
            _copy(source, output, {_ADAPTER_CONFIG: config, _CARD: text.encode()})
        elif source.name == "adapter":
            _merge(source, output, card)
        else:
            note = Tokenizer.load(source).export_note
            _copy(source, output, {_CARD: (card if note is None else f"{card}\n{note}\n").encode()})
    except ImportError as error:
        raise UserError(f"a path in cloud storage needs another package: {error}") from None
    kind = "adapter" if options.adapter else "model"
    show(f"{output}: the {kind} of iteration {number} of {run}, {len(list(output.iterdir()))} files")
    if options.adapter and note is not None:
        show(f"note: {' '.join(note.split())}")


def _settings(run: "epath.Path") -> tuple[dict[str, Any], str]:
    """Returns the run's config.json, and the sha256 of its bytes."""
    path = run / "config.json"
    settings = _read(path) if is_there(path) else {}
    if not {"iterations", "model", "sft", "seed"} <= settings.keys():
        raise UserError(f"--run: {run} is not a run's directory; it must be the --workdir of isheep_jax.train")
    if not all(isinstance(settings[name], dict) for name in ("model", "sft")):
        raise UserError(f"--run: {path} is damaged: its model and sft should be objects; restore it")
    return settings, hashlib.sha256(path.read_bytes()).hexdigest()


def _iteration(run: "epath.Path", number: int) -> int:
    """Returns the iteration to export. number: as on the command line; -1: the newest that is finished."""
    finished = list(finished_models(run))
    if number == 0:
        raise UserError("--iteration: iteration 0 is the base model itself; the run has only measured it")
    if not finished:
        raise UserError(f"--run: {run} has no finished iteration yet; run its command again to go on")
    if number not in (-1, *finished):
        raise UserError(
            f"--iteration: iteration {number} of {run} is not finished; finished: {', '.join(map(str, finished))}"
        )
    chosen = finished[-1] if number == -1 else number
    if not (run / f"iteration_{chosen}" / "summary.json").exists() and (owner := owner_of(run)):
        raise UserError(
            f"--iteration: iteration {chosen} of {run} is being measured by {owner}; wait for it"
            + (f", or export another: {', '.join(map(str, finished[:-1]))}" if finished[:-1] else "")
        )
    return chosen


def _source(run: "epath.Path", number: int, method: str, adapter: bool) -> "epath.Path":
    """Returns the directory of a model or an adapter; of an adapter, too, where a whole model is to be made of it."""
    source = run / f"iteration_{number}" / "adapter" if adapter else finished_models(run)[number]
    if adapter and method != "lora":
        raise UserError(f"--adapter: the run trained all weights (sft.method={method}), so that it has no adapter")
    if not source.is_dir():
        raise UserError(f"--{'adapter' if adapter else 'run'}: {source} is missing; restore it, or start a new run")
    made_models.check(source)
    return source


def _adapter_config(run: "epath.Path", adapter: "epath.Path") -> dict[str, Any]:
    """Returns an adapter's adapter_config.json, with the full path of a base that is a model of the run."""
    path = adapter / _ADAPTER_CONFIG
    config = _read(path)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{path} is damaged: it does not name the adapter's base; {_RESTORE}")
    if re.fullmatch(r"iteration_\d+/(\w+/)?(model|adapter)", base):
        config["base_model_name_or_path"] = str(full_path(run) / base)
    return config


def _base_note(base: str) -> str | None:
    """Returns what to know of an adapter whose base has no name on the hub; None of any other."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return None
    if base.endswith("/adapter"):
        return (
            "The adapter's base is itself stored as an adapter, here on the machine that made it:\n"
            f"{quoted(base, 1000)}\nTo use the adapter, export the model of that iteration, and name it as "
            "base_model_name_or_path in adapter_config.json."
        )
    return (
        "The adapter's base, base_model_name_or_path in adapter_config.json, is a path on the machine that made it; "
        f"elsewhere, set it to where that model is. It is now:\n{quoted(base, 1000)}"
    )


def _step(run: "epath.Path", number: int) -> Step:
    iteration = run / f"iteration_{number}"
    results = read_results(iteration / "evaluation.json") or {}
    if not number:
        return Step(0, evaluation=results)
    trained_on = "thorough" if (iteration / "thorough").exists() else "selected"
    counts = (_kept(iteration / stage / "DONE") for stage in ("instructions", "responses", trained_on))
    return Step(number, *counts, results)


def _kept(manifest: "epath.Path") -> int:
    """Returns how many records of a finished stage are kept."""
    counts = _read(manifest).get("counts")
    if not isinstance(counts, dict) or not isinstance(counts.get("kept"), int):
        raise UserError(f"{manifest} is damaged: it does not say how many records are kept; {_RESTORE}")
    return counts["kept"]


def _judge_check(run: "epath.Path", number: int) -> dict[str, Any] | None:
    """Returns the last check of the judge up to an iteration; None without one."""
    summaries = [run / f"iteration_{n}" / "summary.json" for n in range(number, 0, -1)]
    checks = (_read(path).get("judge_check") for path in summaries if path.exists())
    return next((check for check in checks if check), None)


def _read(path: "epath.Path") -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it should be the JSON object that the run wrote")
    return check_seal(value, str(path), _RESTORE)


def _merge(adapter: "epath.Path", output: "epath.Path", card: str) -> None:
    """Writes the model that an adapter stands for, tensor by tensor, in the memory of this machine."""
    import jax

    from isheep_jax.runtime.opening import open_located

    jax.config.update("jax_platforms", "cpu")  # a device would have little to do, and may be another process's
    with _removed_on_failure(output.with_name(output.name + ".partial")):
        open_located(adapter).save(output, card)


def _copy(source: "epath.Path", output: "epath.Path", changed: Mapping[str, bytes]) -> None:
    """Copies the files under a temporary name that is renamed at the end.

    changed: files that are new or have other content, by name.
    """
    staging = output.with_name(output.name + ".partial")
    names = sorted(path.name for path in source.iterdir() if path.name not in changed)
    with _removed_on_failure(staging):
        staging.mkdir(parents=True)
        for name in names:
            with (source / name).open("rb") as original, (staging / name).open("wb") as copy:
                shutil.copyfileobj(original, copy, _BLOCK)
        for name, data in changed.items():
            (staging / name).write_bytes(data)
        staging.rename(output)


@contextlib.contextmanager
def _removed_on_failure(staging: "epath.Path") -> Iterator[None]:
    """Removes what an earlier attempt left, and what this one leaves when it fails."""

    def remove() -> None:
        if staging.exists():
            staging.rmtree()

    try:
        remove()
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {staging}: {error.strerror or error}; nothing is left there") from error
        raise


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
