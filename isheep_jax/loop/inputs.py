"""What a run reads besides its models: prompt templates, seeds, their digests, and the versions of what it runs on."""

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass

from etils import epath

from isheep_jax.config import Config
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.held_out import is_held_out
from isheep_jax.loop.judging import judges
from isheep_jax.loop.prompting import similar
from isheep_jax.loop.prompting.methods import RESPOND_METHODS, SYNTHESIZE_METHODS
from isheep_jax.loop.prompting.seeds import Seed, check_outputs, read_seeds
from isheep_jax.loop.prompting.templates import Templates, load
from isheep_jax.loop.stages.table import templates_of

_PACKAGES = (
    "isheep_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "tensorflow-datasets",
)


@dataclass(frozen=True)
class Inputs:
    """The files of a run.

    templates: the prompt templates that the settings need.
    seeds: the seed tasks, without those that are in an evaluation set.
    digests: sha256 of each file, by what it is ("seeds", "prompts/quality", ...), and the name of a foreign judge.
    warnings: lines for the user.
    """

    templates: Templates
    seeds: list[Seed]
    digests: dict[str, str]
    warnings: tuple[str, ...] = ()


def read_inputs(config: Config, foreign_judge: epath.Path | None, held_out: Set[str] = frozenset()) -> Inputs:
    """Reads the files that a config names. Raises UserError for what is missing or malformed.

    foreign_judge: the directory of a judge that is none of the run's own models; its name stands for its files.
    held_out: normalized texts of evaluation sets.
    """
    synthesize_method = SYNTHESIZE_METHODS[config.synthesize.method]
    templates = load(config.prompts, templates_of(config))
    for method in (synthesize_method, RESPOND_METHODS[config.respond.method]):
        method.check(templates)
    path = templates.seeds_file(config.synthesize.seeds)
    shots = synthesize_method.shots(config)
    seeds = read_seeds(path, shots, config.synthesize.rules)
    seeds, warnings = _leave_out(held_out, path, seeds, shots)
    if similar.is_used(config) or config.sft.seeds != "none":
        check_outputs(path, seeds)
    digests = {**templates.digests(), "seeds": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Inputs(templates, seeds, {**digests, **judges.identity(foreign_judge)}, warnings)


def _leave_out(
    held_out: Set[str], path: epath.Path, seeds: Sequence[Seed], shots: int
) -> tuple[list[Seed], tuple[str, ...]]:
    """Returns the seeds that are in no evaluation set, and warnings about the others.

    Args:
        held_out: Normalized texts of evaluation sets.
        path: File of the seeds.
        seeds: The seeds of the file.
        shots: Number of seeds that must remain; otherwise it raises UserError.
    """
    usable = [seed for seed in seeds if not is_held_out(seed.instruction, seed.input, held_out)]
    if len(usable) == len(seeds):
        return usable, ()
    first = next(seed.id for seed in seeds if seed not in usable)
    text = (
        f"synthesize.seeds: {len(seeds) - len(usable)} of {len(seeds)} tasks in {path} are in an evaluation set of "
        f"evaluate.tasks ({first} is the first) and left out"
    )
    if len(usable) < shots:
        raise UserError(f"{text}; {len(usable)} remain, but a prompt shows {shots}: add other seeds")
    return usable, (text,)


def environment() -> dict:
    """Returns the versions of what the results depend on besides the settings."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": versions}
