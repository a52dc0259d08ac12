"""The one place that talks to the Hugging Face hub: what a repository holds, its files, and its errors in one line.

Importing this module does not import the hub's library.
"""

import contextlib
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass

from isheep_jax import distributed
from isheep_jax.errors import UserError, one_line

# A model on the hub: org/name, or org/name@revision.
HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Files of a model. Weights in other formats, and training state, are left out.
_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
# Bytes that each of several processes downloads of a model at most.
_LARGEST = 32e9
# Seconds without a byte from the hub after which a request is made again.
_TIMEOUT = 60


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    size: bytes.
    digest: its sha256 or, where the hub has none, git's sha1 of it, after the name of the algorithm and a colon.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A revision of a repository. commit: its hash, so that what is read later belongs together."""

    id: str
    commit: str
    files: tuple[HubFile, ...]


def is_model_file(name: str) -> bool:
    """Returns whether a model is read from a file of this name; directories of a repository hold other formats."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)


def download(path: str, setting: str, hint: str) -> str:
    """Returns the local copy of a model on the hub; missing files are downloaded with a progress bar.

    Args:
        path: org/name or org/name@revision.
        setting: name of the setting that has the path, for messages.
        hint: what else the path may be.

    Raises `UserError` when there is no such model, or it cannot be downloaded.
    """
    import huggingface_hub

    match = HUB_ID.fullmatch(path)
    what = {"repo_id": match["repository"], "revision": match["revision"], "allow_patterns": list(_FILES)}
    with _as_user_errors(path, match["repository"], setting, "neither a directory here nor a model", hint):
        if distributed.is_distributed():
            missing = (
                f.file_size or 0 for f in huggingface_hub.snapshot_download(**what, dry_run=True) if f.will_download
            )
            _check_worth(path, sum(missing), setting)
        return huggingface_hub.snapshot_download(**what)


def _check_worth(path: str, size: int, setting: str) -> None:
    """Raises `UserError` where each of several processes would download a large model. size: bytes."""
    if size > _LARGEST:
        raise UserError(
            f"{setting}: every one of {distributed.process_count()} processes would download {path}, "
            f"{size / 1e9:.0f} GB, to its own disk; copy it once, `python -m isheep_jax.fetch {path} DIRECTORY`, to a "
            f"directory or bucket that all see, and give that"
        )


def repository(path: str, setting: str, hint: str) -> Repository:
    """Returns what a revision of a repository holds. Arguments and errors are those of `download`."""
    import huggingface_hub

    match = HUB_ID.fullmatch(path)
    with _as_user_errors(path, match["repository"], setting, "no model", hint):
        info = huggingface_hub.HfApi().model_info(match["repository"], revision=match["revision"], files_metadata=True)
        files = [
            HubFile(file.rfilename, file.size, f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}")
            for file in info.siblings or ()
        ]
        return Repository(match["repository"], info.sha, tuple(files))


def read(source: Repository, file: HubFile, begin: int, end: int, setting: str) -> bytes:
    """Returns the bytes from `begin` to `end` of a file; the hub is asked again after errors that pass.

    setting: name of the setting that has the repository, for messages. Raises `UserError` when they cannot be read.
    """
    import huggingface_hub
    from huggingface_hub import utils

    url = huggingface_hub.hf_hub_url(source.id, file.name, revision=source.commit)
    with _as_user_errors(f"{source.id}/{file.name}", source.id, setting, "no file", ""):
        headers = {**utils.build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        response = utils.http_backoff("GET", url, headers=headers, timeout=_TIMEOUT)
        utils.hf_raise_for_status(response)
        data = response.content
    if len(data) != end - begin:
        raise UserError(
            f"{setting}: {source.id}/{file.name}: the hub sent {len(data)} bytes for {end - begin}; try again"
        )
    return data


@contextlib.contextmanager
def _as_user_errors(path: str, repository: str, setting: str, kind: str, hint: str) -> Iterator[None]:
    """Turns errors of the hub into one line.

    Args:
        path: what the user gave.
        repository: org/name.
        setting: name of the setting that has the path.
        kind: what the path is not, if the hub does not know it.
        hint: what it may be.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{setting}: {path} is gated: accept its terms at https://huggingface.co/{repository} and log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{setting}: {path} is {kind} on the Hugging Face hub; {hint}") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{setting}: {path} is no directory here, and the Hugging Face hub cannot be reached to download it; {hint}"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"{setting}: {path} cannot be downloaded: HF_HUB_OFFLINE is set") from None
    except Exception as error:
        # Those of the HTTP library have no class in common.
        if not isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith(
            ("httpx", "requests")
        ):
            raise
        raise UserError(f"{setting}: {path} cannot be downloaded: {one_line(error)}") from error
