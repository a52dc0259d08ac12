"""Finds tasks of the harness by name, without reading all of its 14,000 files, and loads them with local data."""

import contextlib
import functools
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from isheep_jax.errors import UserError, did_you_mean, one_line
from isheep_jax.evaluation.harness import PREFIX

# A line of a definition that names a task or a group of tasks.
_NAME = re.compile(r"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
# Tasks of our own, for tasks of the harness that run what the model writes outside a sandbox.
_OWN_TASKS = "humaneval and mbpp are tasks of this package"


def check_installed(task: str) -> None:
    """Raises `UserError` where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f'{task}: {error.name} is not installed: pip install "isheep_jax[eval]"') from None


def check_name(task: str) -> None:
    """Raises `UserError` for a task or group that the harness does not have."""
    check_installed(task)
    name = task.removeprefix(PREFIX)
    if name in _definitions():
        return
    if name in _all_definitions().task_index:
        raise UserError(f"{task} is a tag of several tasks, without a figure of its own; name its tasks or a group")
    raise UserError(
        f"--evaluate.tasks: lm-evaluation-harness has no task '{name}'; {did_you_mean(name, _definitions())}".strip()
    )


def load_task(task: str, task_data: str) -> dict[str, Any]:
    """Returns the harness's task or group, with data, as its `TaskManager.load` does.

    task: with the prefix.
    task_data: directory with local copies, `lm_eval/NAME/SPLIT.jsonl`, for any of the tasks; without one, a task's data
        comes from where its definition says, which is mostly the Hugging Face hub. "": none.
    Raises `UserError` where the data is missing, or the task is not one that can be run here.
    """
    check_name(task)
    name = task.removeprefix(PREFIX)
    _check_safe(task)
    with tempfile.TemporaryDirectory() as directory:
        for part in _parts(name):
            _write_definition(Path(directory), part, task_data)
        manager = _manager(directory, include_defaults=False)
        try:
            loaded = manager.load([name])
        except Exception as error:
            # Data sets and definitions raise errors of many kinds.
            where = f"{task_data or 'DIR'}/lm_eval/{'TASK' if _members(name) else name}"
            raise UserError(
                f"{task} cannot be loaded ({type(error).__name__}: {one_line(error)[:300]}); put its data into "
                f"{where}/SPLIT.jsonl (train, validation, test) and name the directory with --evaluate.task_data, or "
                "use a machine that reaches the hub"
            ) from error
    _check_loaded(task, name, loaded)
    return loaded


def data_digest(task: str, task_data: str) -> str:
    """Returns the sha256 of the local copies that `load_task` reads; "" where all data comes from elsewhere."""
    if not task_data:
        return ""
    local = Path(task_data).expanduser() / "lm_eval"
    copied = {directory.name for directory in local.glob("*")}
    if not copied:
        return ""
    parts = [name for name in _parts(task.removeprefix(PREFIX)) if name in copied]
    paths = [path for part in parts for path in sorted((local / part).glob("*.jsonl"))]
    if not paths:
        return ""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(local).as_posix()} {digest}\n".encode())
    return whole.hexdigest()


@functools.cache
def _definitions() -> dict[str, tuple[str, Path]]:
    """Returns kind ("task" or "group") and file of every task and group that the harness brings."""
    import lm_eval.tasks

    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml")):
        for kind, name in _NAME.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, (kind, path))
    return found


@functools.cache
def _all_definitions() -> Any:
    """Returns the harness's own table of its definitions, which takes it 20 seconds."""
    return _manager(None, include_defaults=True)


def _parts(name: str) -> list[str]:
    """Returns the names of a task, or of a group and of all the tasks and groups in it."""
    found, waiting = set(), [name]
    while waiting:
        part = waiting.pop()
        if part in found:
            continue
        if part in _definitions():
            found.add(part)
            waiting += _members(part)
        elif entry := _all_definitions().task_index.get(part):  # otherwise the group defines its part itself
            waiting += entry.tags
    return sorted(found)


def _members(name: str) -> list[str]:
    """Returns the parts that a definition names: none for a task; tasks, groups and tags for a group."""
    kind, _ = _definitions()[name]
    members = _read_definition(name).get("task") if kind == "group" else None
    named = members if isinstance(members, list) else []
    return [member if isinstance(member, str) else member.get("group") or member["task"] for member in named]


def _read_definition(name: str) -> dict[str, Any]:
    """Returns the content of a definition with what it includes; functions are names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(_definitions()[name][1], resolve_func=False)


def _manager(directory: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with _only_errors("lm_eval.tasks._index"):  # which warns of every definition that another one replaces
        return TaskManager(include_path=directory, include_defaults=include_defaults)


@contextlib.contextmanager
def _only_errors(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write_definition(directory: Path, name: str, task_data: str) -> None:
    """Writes a definition that is the harness's own but for the place of its data. JSON is YAML, too."""
    kind, path = _definitions()[name]
    definition: dict[str, Any] = {"include": str(path)}
    local = Path(task_data).expanduser() / "lm_eval" / name
    files = {file.stem: str(file.resolve()) for file in sorted(local.glob("*.jsonl"))} if task_data else {}
    if kind == "task" and files:
        definition |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        definition |= _available_splits(name, local, files)
    (directory / f"{name}.yaml").write_text(json.dumps(definition))


def _available_splits(name: str, local: Path, files: Container[str]) -> dict[str, None]:
    """Returns what a definition must say so that splits which are not there are not asked for.

    Raises `UserError` for those that the task reads: that of its documents and that of its worked examples.
    """
    definition = _read_definition(name)
    needed = [definition.get("test_split") or definition.get("validation_split")]
    shown = definition.get("fewshot_config") or {}
    if definition.get("num_fewshot") and not (isinstance(shown, dict) and "samples" in shown):
        splits = ("fewshot_split", "training_split", "validation_split")
        needed.append(next((definition[split] for split in splits if definition.get(split)), None))
    for split in filter(None, needed):
        if split not in files:
            raise UserError(f"--evaluate.task_data: {local / split}.jsonl is missing, which lm_eval:{name} reads")
    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    return {key: None for key in names if definition.get(key) and definition[key] not in files}


def _check_safe(task: str) -> None:
    if _read_definition(task.removeprefix(PREFIX)).get("unsafe_code"):
        raise UserError(f"{task} would run what the model writes, without a sandbox; {_OWN_TASKS}")


def _check_loaded(task: str, name: str, loaded: dict[str, Any]) -> None:
    for child in loaded["tasks"].values():
        if getattr(child, "UNSAFE_CODE", False):
            raise UserError(f"{task}: {child.task_name} would run what the model writes, without a sandbox")
        if getattr(child, "MULTIMODAL", False):
            raise UserError(f"{task}: {child.task_name} shows pictures or plays sound; models here read text only")
    group = loaded.get("groups", {}).get(name)
    if group is not None and not group.has_aggregation:
        raise UserError(
            f"{task} is a group without a figure of its own; name its tasks: {', '.join(group.child_names)}"
        )
