"""The models that a run made, known by the digests of their files: recorded in fine_tune.json, compared before use."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError
from isheep_jax.files import check_seal, file_digests, is_there, on_object_store, read_json, sealed, write_json

MANIFEST = "fine_tune.json"
# What a fine-tuning leaves besides its checkpoints, and the file there that people may write in.
_DIRECTORIES = ("model", "adapter")
_CARD = "README.md"
# Directories that this process has written or compared; files change only by damage, and are read once.
_known: set[str] = set()
# The sha256 of files that the processes have written, by path, until `record` has used them.
_written: dict[str, str] = {}


def note_digests(directory: epath.Path, digests: Mapping[str, str]) -> None:
    """Takes the sha256 of files in a model or adapter, by name, from who wrote them: `record` need not read them."""
    _written.update({str(directory / name): digest for name, digest in digests.items()})


def record(directory: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes the manifest of a fine-tuning in `directory`: the values, and the sha256 of the files that it made."""
    if not distributed.is_primary():
        return
    paths = [path for name in _DIRECTORIES if (directory / name).is_dir() for path in _files(directory / name)]
    unknown = [path for path in paths if str(path) not in _written]
    digests = {**_written, **dict(zip(map(str, unknown), file_digests(unknown), strict=True))}
    files = {f"{path.parent.name}/{path.name}": digests[str(path)] for path in paths}
    write_json(directory / MANIFEST, sealed({**values, "files": files}))
    _written.clear()
    _known.update(str(directory / name) for name in _DIRECTORIES)


def read(directory: epath.Path) -> dict[str, Any] | None:
    """Returns the manifest of the fine-tuning in `directory`; None where there is none.

    All processes call this. Raises UserError when it is damaged.
    """
    return distributed.from_primary(lambda: _read(directory))


def model_of(iteration: epath.Path) -> epath.Path | None:
    """Returns the model in an iteration's directory, or the adapter if that is all; None before either is finished.

    Raises UserError when the manifest, or the config.json of what it names, was there and is lost.
    """
    if not is_there(iteration / MANIFEST):
        # The summary of an iteration is written after all else.
        if is_there(iteration / "summary.json"):
            raise UserError(
                f"{iteration / MANIFEST} is missing; restore it, or the run's command makes the model again"
            )
        return None
    model = iteration / ("model" if has_model(iteration) else "adapter")
    if not is_there(model / "config.json"):
        raise UserError(f"{model / 'config.json'} is missing; {_remedy(iteration)}")
    return model


def has_model(iteration: epath.Path) -> bool:
    """Returns whether a finished fine-tuning, by its manifest, has left a whole model, not only an adapter."""
    # Runs of a version that recorded no files have a model.
    files = (_read(iteration) or {}).get("files")
    return not files or any(_is_in(name, "model") for name in files)


def check(model: epath.Path) -> None:
    """Raises UserError when a file of a model or adapter that a run made is missing or has changed; call it before use.

    Every file is read, but for those in a bucket, whose store compares digests of its own: there they must exist.
    Other directories, and those of runs of a version that recorded no digests, pass. All processes call this.
    """
    distributed.from_primary(lambda: _check(model))


def _read(directory: epath.Path) -> dict[str, Any] | None:
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = check_seal(read_json(path), str(path), _remedy(directory))
    if not isinstance(manifest.get("metrics"), dict):
        raise UserError(f"{path} is damaged: it has no metrics; {_remedy(directory)}")
    return manifest


def _check(model: epath.Path) -> None:
    directory = model.parent
    if str(model) in _known or model.name not in _DIRECTORIES or not is_there(directory / MANIFEST):
        return
    files = (_read(directory) or {}).get("files", {})
    expected = {model / name.partition("/")[2]: digest for name, digest in files.items() if _is_in(name, model.name)}
    remedy = _remedy(directory)
    for path in expected:
        if not is_there(path):
            raise UserError(f"{path} is missing; {remedy}")
    if not on_object_store(model):
        for path, digest in zip(expected, file_digests(list(expected)), strict=True):
            if digest != expected[path]:
                raise UserError(f"{path} has changed since the run made it; {remedy}")
    _known.add(str(model))


def _is_in(name: str, directory: str) -> bool:
    return name.startswith(f"{directory}/")


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    return (path for path in sorted(directory.iterdir()) if path.is_file() and path.name != _CARD)


def _remedy(directory: epath.Path) -> str:
    return f"restore it, or remove {directory / MANIFEST} and the run's command makes the model again"
