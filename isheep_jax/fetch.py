"""The command that copies a model from the Hugging Face hub to a directory or bucket, once for all workers of a slice.

python -m isheep_jax.fetch meta-llama/Meta-Llama-3-70B gs://BUCKET/Meta-Llama-3-70B
"""

import hashlib
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import report_error, run_command
from isheep_jax.cli.output import show
from isheep_jax.errors import UserError
from isheep_jax.files import as_user_error, check_writable, is_there, read_json, whole_file, write_json
from isheep_jax.runtime import hub

if TYPE_CHECKING:
    from etils import epath

# The file that says which revision of which model a directory holds, and of which files; it is written first.
_RECORD = "fetch.json"
# The file that a directory is known by; it is copied when all others are there.
_LAST = "config.json"
_NAMES = "give org/name or org/name@revision"
_INDEX = "model.safetensors.index.json"
# Files that a process copies at the same time, bytes of a request, and requests of a file that are under way: together
# they bound the memory, and one stream does not fill a network.
_FILES_AT_ONCE = 4
_BLOCK = 64 * 2**20
_AHEAD = 2


@dataclass(frozen=True)
class FetchOptions:
    """Options of the command."""

    model: str = ""
    """Model on the Hugging Face hub: org/name or org/name@revision. HF_TOKEN gives access to gated ones."""
    output: str = ""
    """Directory to write: a local path or gs://bucket/path. What an earlier try has copied stays."""
    file: str = ""
    """GGUF file of the repository to copy, in place of the model's safetensors."""


COMMAND = Command(
    module="isheep_jax.fetch",
    options=FetchOptions,
    usage=("MODEL OUTPUT [--file=NAME.gguf]",),
    about="Copies a model of the Hugging Face hub to OUTPUT, a directory or bucket; several processes share the work.",
    example="meta-llama/Meta-Llama-3-70B gs://bucket/Meta-Llama-3-70B",
    positional=("model", "output"),
    required=("model", "output"),
)


def main(arguments: Sequence[str]) -> None:
    """Copies what is missing of a model. Raises `UserError` for bad input, and for what differs from the hub's."""
    options = COMMAND.parse(arguments)
    if not hub.HUB_ID.fullmatch(options.model):
        raise UserError(
            f"--model: {options.model} is no name on the Hugging Face hub; give org/name or org/name@revision"
        )

    from isheep_jax import distributed

    with distributed.distributed_session(lambda error: report_error(error, COMMAND.module, arguments)):
        if distributed.is_distributed():
            facts = {f"--{name}": value for name, value in asdict(options).items()}
            distributed.check_agreement({**facts, "the source files of isheep_jax": distributed.code_digest()})
        _fetch(options)


def _fetch(options: FetchOptions) -> None:
    from etils import epath

    from isheep_jax import distributed

    output = epath.Path(options.output).expanduser()
    plan = distributed.from_primary(lambda: _plan(options, output))
    source = hub.Repository(plan["repository"], plan["commit"], tuple(hub.HubFile(**file) for file in plan["files"]))
    missing = [file for file in source.files if file.name in plan["missing"]]
    distributed.check_shared(output, "--output")
    if distributed.is_primary():
        show(
            f"{source.id} at {source.commit[:12]}: {len(source.files)} files, {_size(source.files)}; "
            f"{len(missing)} to copy, {_size(missing)}"
        )
    # The last file waits for those of all processes.
    shares = _shares([file for file in missing if file.name != _LAST], distributed.process_count())
    _copy_all(source, shares[distributed.process_index()], output)
    distributed.wait_for_all()
    if distributed.is_primary():
        _copy_all(source, [file for file in missing if file.name == _LAST], output)
        show(f"{output}: whole; --model.path={output / options.file if options.file else output} reads it")


def _plan(options: FetchOptions, output: "epath.Path") -> dict[str, Any]:
    """Returns the repository, its files that make up the model, and the names of those that are not there, as JSON."""
    source = hub.repository(options.model, "--model", _NAMES)
    files = _gguf_file(source, options.file) if options.file else _model_files(source)
    check_writable("--output", output)
    with as_user_error("--output", output):
        record = {
            "repository": source.id,
            "commit": source.commit,
            "files": [asdict(file) for file in sorted(files, key=lambda file: file.name)],
        }
        _check_same(output, record)
        write_json(output / _RECORD, record)
        return {**record, "missing": [file.name for file in files if not _is_whole(output, file)]}


def _model_files(source: hub.Repository) -> list[hub.HubFile]:
    """Returns the files that a model is read from: all that are no weights, and the weights that the index names."""
    files = {file.name: file for file in source.files if hub.is_model_file(file.name)}
    if _LAST not in files:
        raise UserError(f"--model: {source.id} has no {_LAST}: it is no model in Hugging Face format{_ggufs(source)}")
    weights = _weights(source, files)
    lost = sorted(weights - files.keys())
    if lost or not weights:
        what = f"lacks {lost[0]}, which its index names" if lost else "has no weights in safetensors"
        raise UserError(f"--model: {source.id} {what}{_ggufs(source)}")
    return [file for file in files.values() if file.name in weights or not file.name.endswith(".safetensors")]


def _weights(source: hub.Repository, files: dict[str, hub.HubFile]) -> set[str]:
    """Returns the names of the files with the weights. files: those of the model, by name."""
    if _INDEX not in files:
        return {"model.safetensors"} & files.keys()
    index = files[_INDEX]
    try:
        return set(json.loads(hub.read(source, index, 0, index.size, "--model"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--model: {source.id}/{_INDEX} is damaged: it does not say where the tensors are") from None


def _gguf_file(source: hub.Repository, name: str) -> list[hub.HubFile]:
    found = [file for file in source.files if file.name == name and name.lower().endswith(".gguf")]
    if not found or "/" in name:
        raise UserError(f"--file: {source.id} has no GGUF file {name}{_ggufs(source)}")
    return found


def _ggufs(source: hub.Repository) -> str:
    """Returns the GGUF files of a repository, to be added to a sentence; "" if there are none."""
    names = [file.name for file in source.files if file.name.lower().endswith(".gguf") and "/" not in file.name]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; --file copies one of its GGUF files: {', '.join(names[:3])}{more}" if names else ""


def _check_same(output: "epath.Path", record: dict[str, Any]) -> None:
    """Raises `UserError` when a directory holds anything but (a part of) the same revision of the same model."""
    path = output / _RECORD
    if is_there(path):
        other = read_json(path)
        if other != record:
            held = "another model"
            if isinstance(other, dict) and "repository" in other:
                held = f"{other['repository']} at {str(other.get('commit'))[:12]}"
            raise UserError(
                f"--output: {output} holds {held}, and {record['repository']} is at {record['commit'][:12]} now; name "
                "another directory, or that revision after an @"
            )
    elif there := [entry.name for entry in output.iterdir() if not entry.name.startswith(".")]:
        raise UserError(f"--output: {output} holds other files, such as {min(there)}; name a directory that does not")


def _is_whole(output: "epath.Path", file: hub.HubFile) -> bool:
    # Files are there whole or not at all, but for those that a bucket has of a process that was stopped.
    path = output / file.name
    return path.exists() and path.stat().length == file.size


def _shares(files: Sequence[hub.HubFile], processes: int) -> list[list[hub.HubFile]]:
    """Returns the files that each process copies: about the same number of bytes."""
    shares: list[list[hub.HubFile]] = [[] for _ in range(processes)]
    sizes = [0] * processes
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        least = sizes.index(min(sizes))
        shares[least].append(file)
        sizes[least] += file.size
    return shares


def _copy_all(source: hub.Repository, files: Sequence[hub.HubFile], output: "epath.Path") -> None:
    from isheep_jax import distributed

    stopping = threading.Event()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as copiers:
        futures = [copiers.submit(_copy, source, file, output / file.name, stopping) for file in files]
        try:
            for future in as_completed(futures):
                line = future.result()
                if distributed.is_primary():
                    show(line)
        except BaseException:
            stopping.set()
            raise


def _copy(source: hub.Repository, file: hub.HubFile, path: "epath.Path", stopping: threading.Event) -> str:
    """Copies a file and returns a line about it."""
    begin = time.monotonic()
    algorithm, _, expected = file.digest.partition(":")
    digest = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(f"blob {file.size}\0".encode())
    with as_user_error("--output", path), whole_file(path) as copy:
        last = b""
        for block in _blocks(source, file):
            if stopping.is_set():
                raise UserError("--output: another file could not be copied")
            copy.write(last)
            digest.update(block)
            last = block
        if digest.hexdigest() != expected:
            raise UserError(
                f"--model: {source.id}/{file.name}: the {algorithm} of what came is not the hub's; try again"
            )
        # A bucket keeps what was written of a file that fails; without its last block it is not taken for whole.
        copy.write(last)
    if path.stat().length != file.size:
        raise UserError(f"--output: {path} has {path.stat().length} bytes of {file.size}; run the same command again")
    seconds = time.monotonic() - begin
    return f"{file.name}: {_size([file])}" + (f", {file.size / 1e6 / seconds:.0f} MB/s" if seconds > 1 else "")


def _blocks(source: hub.Repository, file: hub.HubFile) -> Iterator[bytes]:
    """Yields a file's bytes; the next requests are under way meanwhile."""
    with ThreadPoolExecutor(_AHEAD) as readers:
        waiting: deque = deque()
        for begin in range(0, file.size, _BLOCK):
            end = min(begin + _BLOCK, file.size)
            waiting.append(readers.submit(hub.read, source, file, begin, end, "--model"))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _size(files: Sequence[hub.HubFile]) -> str:
    size = sum(file.size for file in files)
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
