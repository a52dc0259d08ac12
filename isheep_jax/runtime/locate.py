"""Resolves a model argument (tiny, run, HF directory, GGUF file, gs://, hub id) to a checkpoint directory or file."""

import difflib
import re
from pathlib import Path

from etils import epath

from isheep_jax.config import OWN_JUDGES, Config, EvaluateConfig, is_server
from isheep_jax.errors import UserError
from isheep_jax.gguf_model.files import is_gguf
from isheep_jax.tiny import EMBEDDED

# Files that are downloaded from the hub; weights in other formats and training state are left out.
_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate_model(path: str, setting: str = "--model") -> epath.Path:
    """Returns the checkpoint directory in Hugging Face format, or the GGUF file, that `path` names.

    path: 'tiny' (the embedded base model), 'tiny_pages' (the one that reads examples), a run directory (its newest
    finished model), a checkpoint directory or a GGUF file, also in a bucket (gs://...), or a hub id (org/name or
    org/name@revision, which is downloaded).
    setting: name of the setting in error messages.
    Raises `UserError` when it is none of them, or cannot be reached.
    """
    if path in EMBEDDED:
        return epath.Path(EMBEDDED[path])
    directory = epath.Path(path).expanduser()
    try:
        if is_gguf(directory):
            return directory
        if not directory.is_dir():
            if directory.suffix.lower() == ".gguf":
                raise UserError(f"{setting}: there is no file {path}")
            # A hub id, unless its first part is a local directory: then the user misspelled a name in it.
            match = _HUB_ID.fullmatch(path)
            if match and not Path(path).parent.is_dir():
                return epath.Path(_download(path, match["repository"], match["revision"], setting))
            raise UserError(
                f"{setting}: {path} is no directory; give a model directory in Hugging Face format, a GGUF file, a "
                f"run's directory, a hub id (org/name) or {' or '.join(EMBEDDED)}"
            )
        if (directory / "iteration_0").is_dir() or (directory / "iteration_1").is_dir():
            return _newest_model(directory, setting)
        if not (directory / "config.json").exists():
            raise UserError(
                f"{setting}: {path} is neither a model directory in Hugging Face format (it has no config.json) nor a "
                "run's directory"
            )
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{setting}: {path} needs a package that is not installed: {error}") from None
    except Exception as error:
        # Every object store raises errors of its own.
        raise UserError(f"{setting}: {path} cannot be reached: {type(error).__name__}: {error}") from error
    return directory


def locate_judge(config: Config) -> epath.Path | None:
    """Returns the directory of `assess.judge`; None if that is one of the run's own models or a server.

    Raises `UserError` when there is no such model.
    """
    judge = config.assess.judge
    if judge in OWN_JUDGES or is_server(judge):
        return None
    near = difflib.get_close_matches(judge, OWN_JUDGES, n=1)
    if near and not epath.Path(judge).expanduser().is_dir():
        raise UserError(f"--assess.judge: there is no judge '{judge}'; did you mean '{near[0]}'?")
    return locate_model(judge, "--assess.judge")


def locate_evaluation_judge(settings: EvaluateConfig, setting: str = "--evaluate.judge") -> epath.Path | None:
    """Returns the directory of `evaluate.judge`; None if there is none or it is a server.

    Raises `UserError` when there is no such model.
    """
    judge = settings.judge
    return None if not judge or is_server(judge) else locate_model(judge, setting)


def finished_models(run: epath.PathLike) -> dict[int, epath.Path]:
    """Returns the models of a run's finished iterations by iteration number."""
    models = {}
    for iteration in epath.Path(run).iterdir():
        match = re.fullmatch(r"iteration_(\d+)", iteration.name)
        if match and (iteration / "model" / "config.json").exists():
            models[int(match[1])] = iteration / "model"
    return models


def _newest_model(run: epath.Path, setting: str) -> epath.Path:
    models = finished_models(run)
    if not models:
        raise UserError(f"{setting}: the run {run} has no finished model yet; run its command again to go on")
    return models[max(models)]


def _download(path: str, repository: str, revision: str | None, setting: str) -> str:
    """Returns the local copy of a repository on the hub; missing files are downloaded with a progress bar."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(_FILES))
    except GatedRepoError:
        raise UserError(
            f"{setting}: {path} is gated: accept its terms at https://huggingface.co/{repository} and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{setting}: {path} is neither a directory here nor a model on the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{setting}: {path} is no directory here, and the Hugging Face hub cannot be reached to download it"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be downloaded: {str(error).splitlines()[0]}") from error
