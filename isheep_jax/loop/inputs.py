"""What a run reads beside its models: prompt templates, seeds, their digests, and the versions of what it runs on."""

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
from dataclasses import dataclass

from etils import epath

from isheep_jax.config import Config
from isheep_jax.loop.judging import judges
from isheep_jax.loop.judging.scores import criteria_of
from isheep_jax.loop.prompting import similar
from isheep_jax.loop.prompting.methods import templates_of
from isheep_jax.loop.prompting.seeds import Seed, check_outputs, read_seeds
from isheep_jax.loop.prompting.templates import Templates, load
from isheep_jax.loop.prompting.topics import read_types

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
    seeds: the seed tasks.
    digests: sha256 of each file, by what it is ("seeds", "prompts/quality", ...), and the name of a foreign judge.
    """

    templates: Templates
    seeds: list[Seed]
    digests: dict[str, str]


def read_inputs(config: Config, foreign_judge: epath.Path | None) -> Inputs:
    """Reads the files that a config names. Raises UserError for what is missing or malformed.

    foreign_judge: the directory of a judge that is none of the run's own models; its name stands for its files.
    """
    follow_up = ("follow_up",) if config.synthesize.turns == 2 else ()
    thorough = ("thorough",) if config.clone.enabled else ()
    names = ("synthesize", *criteria_of(config.assess).values(), *follow_up, *templates_of(config), *thorough)
    templates = load(config.prompts, names)
    if config.synthesize.method == "topics":
        read_types(templates.topics_file)
    path = templates.seeds_file(config.synthesize.seeds)
    by_similarity = config.synthesize.method == "retrieved"
    seeds = read_seeds(path, 1 if by_similarity else config.synthesize.shots, config.synthesize.rules)
    if similar.is_used(config) or config.sft.seeds != "none":
        check_outputs(path, seeds)
    if similar.is_used(config):
        templates.check_retrieved()
    digests = {**templates.digests(), "seeds": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Inputs(templates, seeds, {**digests, **judges.identity(foreign_judge)})


def environment() -> dict:
    """Returns the versions of what the results depend on beside the settings."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": versions}
