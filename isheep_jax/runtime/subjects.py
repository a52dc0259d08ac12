"""The models that the command `evaluate` measures: a checkpoint, or models of a run, loaded one at a time."""

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from etils import epath

from isheep_jax import distributed
from isheep_jax.checkpoint.pretrained import Pretrained
from isheep_jax.config import DecodeConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.errors import UserError
from isheep_jax.files import read_json
from isheep_jax.loop import made_models
from isheep_jax.loop.run_directory import stored_settings, with_later_settings
from isheep_jax.runtime.decoding import decoding_facts
from isheep_jax.runtime.devices import default_dtype
from isheep_jax.runtime.load import make_engine
from isheep_jax.runtime.locate import finished_models, locate_model
from isheep_jax.runtime.opening import open_located
from isheep_jax.tiny import EMBEDDED


@dataclass(frozen=True)
class Decoding:
    """How models are loaded and asked.

    chat_template: "auto" or a name, as `model.chat_template`. compute_dtype: or "auto", float32 on CPUs and bfloat16
        elsewhere. decode_tensor: shards of heads and feed-forward units.
    """

    chat_template: str = "auto"
    compute_dtype: str = "auto"
    seed: int = 0
    decode_tensor: int = 1
    decode: DecodeConfig = field(default_factory=DecodeConfig)


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    label: its name in tables. directory: its checkpoint. output: gets `evaluation.json` and `evaluation/`.
    owned: what no other process may write in meanwhile: the run, or the directory that is named for the results.
    """

    label: str
    directory: epath.Path
    output: epath.Path
    owned: epath.Path
    decoding: Decoding

    def open(self) -> Pretrained:
        """Returns the model without its weights. Raises `UserError` as `open_model`, and for a damaged one of a run."""
        made_models.check(self.directory)
        model = open_located(self.directory, self.decoding.chat_template)
        model.check_messages()
        return model

    def facts(self) -> dict[str, Any]:
        """Returns what responses depend on besides prompts, with the digest of the weights, for the record."""
        model, decoding = self.open(), self.decoding
        dtype = default_dtype() if decoding.compute_dtype == "auto" else decoding.compute_dtype
        weights = distributed.from_primary(model.weights_digest)
        return {**decoding_facts(model, decoding.decode, jnp.dtype(dtype), decoding.seed), "weights": weights}


def subjects(path: str, iterations: str, output: str, decoding: Decoding) -> list[Subject]:
    """Returns the models that `--model` names.

    Args:
        path: What `locate_model` takes.
        iterations: Of a run: "newest", "all" (the base model, too), or a number; 0 is the base model.
        output: Directory for the results. "": a run's own iterations, and evaluations/NAME for another model.
        decoding: How they are asked. Where it has defaults, a run's models are asked as in the run.

    Raises `UserError` when there is no such model or iteration.
    """
    directory = epath.Path(path).expanduser()
    if (directory / "iteration_0").is_dir() or (directory / "iteration_1").is_dir():
        return _of_run(directory, iterations, epath.Path(output) if output else directory, decoding)
    if iterations != "newest":
        option = "--all_iterations" if iterations == "all" else "--iteration"
        raise UserError(f"{option}: {path} is not a run's directory; leave the option out")
    checkpoint = locate_model(path, adapters=True)
    named = path if path in EMBEDDED or not directory.is_dir() else str(directory.resolve())
    name = re.sub(r"[^\w.@-]", "_", named.rstrip("/").rpartition("/")[2]) or "model"
    results = epath.Path(output or f"evaluations/{name}")
    return [Subject(name, checkpoint, results, results, decoding)]


def _of_run(run: epath.Path, iterations: str, output: epath.Path, decoding: Decoding) -> list[Subject]:
    settings = _settings(run)
    models = finished_models(run)
    if iterations == "newest":
        if not models:
            raise UserError(f"--model: the run {run} has no finished model yet; --iteration=0 is its base model")
        chosen = [max(models)]
    else:
        chosen = [0, *sorted(models)] if iterations == "all" else [int(iterations)]
    decoding = _as_in_run(decoding, settings)

    def subject(number: int) -> Subject:
        if number and number not in models:
            known = ", ".join(["0 (the base)", *map(str, sorted(models))])
            raise UserError(f"--iteration: {run} has no model of iteration {number}; it has {known}")
        checkpoint = models[number] if number else locate_model(settings["model.path"], "--model")
        label = f"iteration {number}" if number else "iteration 0 (base)"
        return Subject(label, checkpoint, output / f"iteration_{number}", output, decoding)

    return [subject(number) for number in chosen]


def _settings(run: epath.Path) -> Mapping[str, Any]:
    """Returns the settings of a run by their command-line names."""
    tree = read_json(run / "config.json")
    settings = stored_settings(tree) if isinstance(tree, dict) else {}
    if "model.path" not in settings:
        raise UserError(f"--model: {run}/config.json is not that of a run; name one of its model directories")
    return with_later_settings(settings)


def _as_in_run(decoding: Decoding, settings: Mapping[str, Any]) -> Decoding:
    """Returns the decoding with a run's settings in place of defaults, so that its own figures can be compared."""
    default, decode = Decoding(), decoding.decode
    names = ("max_length", "weights_dtype", "kv_cache_dtype")
    own = {n: settings[f"decode.{n}"] for n in names if getattr(decode, n) == getattr(DecodeConfig(), n)}
    return replace(
        decoding,
        **{
            n: settings[f"model.{n}"]
            for n in ("chat_template", "compute_dtype")
            if getattr(decoding, n) == getattr(default, n)
        },
        seed=decoding.seed or settings["seed"],
        decode=replace(decode, **own),
    )


class OneModel:
    """Loads models, one at a time: two sets of weights may not fit. decoding: how they are asked."""

    def __init__(self, decoding: Decoding):
        self._decoding = decoding
        self._held: tuple[epath.Path, Engine] | None = None

    def load(self, directory: epath.Path, chat_template: str = "") -> Engine:
        """Returns an engine for a checkpoint; a call for the one that is held costs nothing.

        chat_template: "": that of the decoding.
        """
        if self._held is None or self._held[0] != directory:
            self._held = None
            gc.collect()  # an engine may be part of reference cycles
            decoding = self._decoding
            engine = make_engine(
                open_located(directory, chat_template or decoding.chat_template),
                decode=decoding.decode,
                decode_tensor=decoding.decode_tensor,
                compute_dtype=decoding.compute_dtype,
                seed=decoding.seed,
            )
            self._held = (directory, engine)
        return self._held[1]
