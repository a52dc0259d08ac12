"""Who scores, and how it is asked: one of the run's own models, another model or a server."""

from etils import epath

from isheep_jax.config import OWN_JUDGES, Config, is_server
from isheep_jax.loop.judging.reader import Framing
from isheep_jax.loop.run_directory import RunDirectory


def identity(directory: epath.Path | None) -> dict[str, str]:
    """Returns what identifies a foreign judge when a run resumes: the end of its path (its revision, for a hub id)."""
    return {} if directory is None else {"assess.judge": "/".join(directory.parts[-2:])}


def judging_iteration(judge: str, iteration: int) -> int:
    """Returns the number of the iteration whose model judges in an iteration; 0 is the base model.

    judge: one of `config.OWN_JUDGES`.
    """
    back = {"current": 1, "previous": 2, "base": iteration}[judge]
    return max(iteration - back, 0)


def own_model(directory: RunDirectory, judge: str, iteration: int) -> epath.Path | None:
    """Returns the run's own model that judges in an iteration; None for the base model."""
    return directory.model(judging_iteration(judge, iteration))


def second_judge(config: Config) -> str:
    """Returns the judge that the first one is compared with."""
    return "current" if config.assess.judge == "base" else "base"


def framing_of(config: Config, judge: str, iteration: int) -> Framing:
    """Returns how a judge is asked in an iteration.

    judge: a value of `assess.judge`. A server is told to go on with a text.
    """
    if config.assess.framing != "auto":
        return config.assess.framing
    is_base = judge in OWN_JUDGES and judging_iteration(judge, iteration) == 0
    return "text" if is_server(judge) or (is_base and config.respond.base_prompt == "bare") else "chat"
