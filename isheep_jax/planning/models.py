"""Finds the architecture of a model to plan for, without a download."""

import re
from pathlib import Path

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.tiny import EMBEDDED

# The fields of config.json that determine the architecture, in a file per known model: its hub id with "--" for "/".
_CONFIGS = Path(__file__).parent / "models"


def known_models() -> list[str]:
    """Returns the hub ids whose architecture is known."""
    return sorted(path.stem.replace("--", "/") for path in _CONFIGS.glob("*.json"))


def planned_architecture(path: str, work: Path) -> Architecture:
    """Returns the architecture of `model.path`: a directory's or GGUF file's own, or the known one of a hub id.

    work: an empty directory for temporary files.
    Raises `UserError` when `path` is neither a directory or GGUF file nor a known hub id.
    """
    if path in EMBEDDED:
        return read_architecture(EMBEDDED[path])
    if Path(path).expanduser().exists():
        return read_architecture(Path(path).expanduser())
    known = _CONFIGS / f"{re.sub('@.*', '', path).replace('/', '--')}.json"
    if not known.is_file():
        raise UserError(
            f"--model.path: {path} is not a directory, and its architecture is not known without a download; "
            f"known: {', '.join(known_models())}"
        )
    (work / "config.json").write_text(known.read_text())
    return read_architecture(work)
