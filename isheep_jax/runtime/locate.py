"""Resolves a model argument (tiny, run, HF directory, GGUF file, gs://, hub id) to a checkpoint directory or file."""

import difflib
import re
from pathlib import Path

from etils import epath

from isheep_jax.checkpoint.adapter_config import is_adapter
from isheep_jax.config import OWN_JUDGES, Config, EvaluateConfig, is_server
from isheep_jax.config_checks import check_scheme
from isheep_jax.errors import UserError, one_line
from isheep_jax.files import is_there
from isheep_jax.gguf_model.files import is_gguf
from isheep_jax.loop import made_models
from isheep_jax.runtime import hub
from isheep_jax.text.json_files import read_json_object
from isheep_jax.tiny import EMBEDDED

_ADAPTER = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FORMS = (
    "give a model directory in Hugging Face format, a GGUF file, a run's directory, a hub id (org/name) or "
    f"{' or '.join(EMBEDDED)}"
)
# Characters of an adapter's base that a message quotes.
_QUOTED = 100


def locate_model(path: str, setting: str = "--model", *, adapters: bool = False) -> epath.Path:
    """Returns the checkpoint directory in Hugging Face format, or the GGUF file, that `path` names.

    path: 'tiny' (the embedded base model), 'tiny_pages' (the one that reads examples), a run directory (its newest
    finished model), a checkpoint directory or a GGUF file, also in a bucket (gs://...), the hub's cache of a model, or
    a hub id (org/name or org/name@revision, which is downloaded where there is no such path here).
    setting: name of the setting in error messages. adapters: whether the adapter that a run stored in place of a model
    will do, which `open_located` opens.
    Raises `UserError` when it is none of them, or cannot be reached.
    """
    if path in EMBEDDED:
        return epath.Path(EMBEDDED[path])
    if not path:
        raise UserError(f"{setting}: it is empty; {_FORMS}")
    check_scheme(setting, path)
    try:
        directory = epath.Path(path).expanduser()
        if is_gguf(directory):
            return directory
        if directory.is_dir():
            return _model_in(directory, path, setting, adapters)
        if directory.exists():
            raise UserError(f"{setting}: {path} is a file; give the directory that it is in, or a GGUF file")
        if directory.suffix.lower() == ".gguf":
            raise UserError(f"{setting}: there is no file {path}")
        hint = f"{_near(path)}{_FORMS}"
        if not hub.HUB_ID.fullmatch(path):
            raise UserError(f"{setting}: {path} is no directory; {hint}")
        return _model_in(epath.Path(hub.download(path, setting, hint)), path, setting, adapters)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{setting}: {path} needs a package that is not installed: {one_line(error)}") from None
    except Exception as error:
        # Every object store raises errors of its own.
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise UserError(f"{setting}: {path} cannot be reached: {kind}{one_line(error)}") from error


def _model_in(directory: epath.Path, path: str, setting: str, adapters: bool) -> epath.Path:
    """Returns the model that a directory is or holds. path: what the user gave. Raises `UserError` when it holds none.

    Whoever looked in the hub's cache finds a directory for each revision there, and one for all.
    """
    if (directory / "iteration_0").is_dir() or (directory / "iteration_1").is_dir():
        return _whole(_newest_model(directory, setting), setting, adapters)
    if (directory / "snapshots").is_dir():
        directory = _cached(directory, setting)
    has_config = is_there(directory / "config.json")
    if (directory / _ADAPTER).exists():
        base = _adapter_base(directory / _ADAPTER)
        if has_config and any((directory / name).exists() for name in _WEIGHTS):
            raise UserError(
                f"{setting}: {path} holds a model and a LoRA adapter of {base} ({_ADAPTER}), of which only one can be "
                "meant; move the files of the adapter into a directory of their own"
            )
        if is_adapter(directory):
            made_models.check(directory)
            return _whole(directory, setting, adapters)
        raise UserError(
            f"{setting}: {path} is a LoRA adapter of {base}, not a model; merge it into that (merge_and_unload of PEFT)"
            " or, if a run made it, give the run's directory"
        )
    if has_config:
        made_models.check(directory)
        return directory
    raise UserError(
        f"{setting}: {path} is neither a model directory in Hugging Face format (it has no config.json) nor a run's "
        f"directory{_hint(directory, path)}"
    )


def _whole(model: epath.Path, setting: str, adapters: bool) -> epath.Path:
    """Returns the model. Raises `UserError` when it is an adapter where none will do."""
    if is_adapter(model) and not adapters:
        raise UserError(
            f"{setting}: {model} is a LoRA adapter without the weights of its base, and a whole model is needed here; "
            "merge them: python -m isheep_jax.export RUN DIRECTORY"
        )
    return model


def _hint(directory: epath.Path, path: str) -> str:
    """Returns where the model may be if a directory has no config.json, to be added to a sentence that says so."""
    names = sorted(entry.name for entry in directory.iterdir())
    if "config.json" in names:
        # As in a cache of the hub whose files were moved away.
        return "; config.json there is a link to a file that is missing"
    # The directory of a run's iteration, and those that conversion tools make.
    inside = [name for name in names if (directory / name / "config.json").exists()]
    inside += [name for name in names if name.lower().endswith(".gguf")]
    if inside:
        return f"; did you mean {directory / inside[0]}?"
    empty = "" if names else "; it is empty"
    hidden = "; the hub is not asked for a model of this name while the directory is here"
    return empty + (hidden if hub.HUB_ID.fullmatch(path) else "")


def _cached(directory: epath.Path, setting: str) -> epath.Path:
    """Returns the revision that a model has in the hub's cache: the only one, or that of the branch main."""
    revisions = sorted(entry.name for entry in (directory / "snapshots").iterdir() if entry.is_dir())
    main = directory / "refs" / "main"
    if len(revisions) > 1 and main.exists() and (name := main.read_text(encoding="utf-8").strip()) in revisions:
        revisions = [name]
    if len(revisions) == 1:
        return directory / "snapshots" / revisions[0]
    there = f"{len(revisions)} revisions, {' and '.join(revisions[:2])}" if revisions else "no revision"
    raise UserError(
        f"{setting}: {directory} is the hub's cache of a model, with {there}; give the directory of one in snapshots/, "
        "or the hub id"
    )


def _adapter_base(path: epath.Path) -> str:
    """Returns which model an adapter is for, by its adapter_config.json, in words."""
    try:
        base = read_json_object(path).get("base_model_name_or_path")
    except UserError:
        base = None
    return repr(base[:_QUOTED]) if base and isinstance(base, str) else "a base that it does not name"


def locate_judge(config: Config) -> epath.Path | None:
    """Returns the directory of `assess.judge`; None if that is one of the run's own models or a server.

    Raises `UserError` when there is no such model.
    """
    judge = config.assess.judge
    if judge in OWN_JUDGES or is_server(judge):
        return None
    _check_no_bare_url(judge, "--assess.judge")
    near = difflib.get_close_matches(judge, OWN_JUDGES, n=1)
    if near and not epath.Path(judge).expanduser().is_dir():
        raise UserError(f"--assess.judge: there is no judge '{judge}'; did you mean '{near[0]}'?")
    return locate_model(judge, "--assess.judge")


def locate_evaluation_judge(settings: EvaluateConfig, setting: str = "--evaluate.judge") -> epath.Path | None:
    """Returns the directory of `evaluate.judge`; None if there is none or it is a server.

    Raises `UserError` when there is no such model.
    """
    judge = settings.judge
    if not judge or is_server(judge):
        return None
    _check_no_bare_url(judge, setting)
    return locate_model(judge, setting)


def _check_no_bare_url(judge: str, setting: str) -> None:
    if re.match(r"[\w.-]+:\d+(/|$)", judge):
        raise UserError(f"{setting}: {judge} is no URL without http:// or https:// in front of it")


def finished_models(run: epath.PathLike) -> dict[int, epath.Path]:
    """Returns the models, or adapters in their place, of a run's finished iterations by number, in order of it.

    Raises UserError when one has lost a file that it had when its iteration was finished.
    """
    models = {}
    for iteration in epath.Path(run).iterdir():
        match = re.fullmatch(r"iteration_([1-9]\d*)", iteration.name)
        if match and (model := made_models.model_of(iteration)):
            models[int(match[1])] = model
    return dict(sorted(models.items()))


def _newest_model(run: epath.Path, setting: str) -> epath.Path:
    models = finished_models(run)
    if not models:
        raise UserError(f"{setting}: the run {run} has no finished model yet; run its command again to go on")
    made_models.check(models[max(models)])
    return models[max(models)]


def _near(path: str) -> str:
    """Returns "did you mean '...'? " with the entry next to a path that does not exist whose name is the nearest."""
    place = Path(path)
    try:
        names = [entry.name for entry in place.expanduser().parent.iterdir() if entry.is_dir() or is_gguf(entry)]
    except OSError:
        return ""
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"did you mean '{place.with_name(near[0])}'? " if near else ""
