"""The architecture of a model that is planned for, without a download."""

import re
from pathlib import Path

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.tiny import CHECKPOINT

# The fields of each model's config.json that the mathematics needs, by the model's id with "--" for "/".
FACTS = Path(__file__).parent / "models"


def known_models() -> list[str]:
    """Hub ids whose architecture is known here."""
    return sorted(path.stem.replace("--", "/") for path in FACTS.glob("*.json"))


def planned_architecture(path: str, work: Path) -> Architecture:
    """The architecture of `model.path`: a directory's own config.json, or what is known here of a hub id.

    work: an empty directory for the call's own use. Raises `UserError` when it is neither.
    """
    if path in ("tiny", "tiny_pages"):
        return read_architecture(CHECKPOINT)
    if Path(path).expanduser().is_dir():
        return read_architecture(Path(path).expanduser())
    facts = FACTS / f"{re.sub('@.*', '', path).replace('/', '--')}.json"
    if not facts.is_file():
        raise UserError(
            f"--model.path: {path} is not a directory, and its architecture is not known without a download; "
            f"known: {', '.join(known_models())}"
        )
    (work / "config.json").write_text(facts.read_text())
    return read_architecture(work)
