"""Finds tasks of the harness by name, without reading all of its 14,000 files, and loads them with local data."""

import contextlib
import functools
import json
import logging
import re
import tempfile
from collections.abc import Iterator
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
        f"--tasks: lm-evaluation-harness has no task '{name}'; {did_you_mean(name, _definitions())}".strip()
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
    kind, path = _definitions()[name]
    local = _local_data(task_data)
    with tempfile.TemporaryDirectory() as directory:
        for own, files in local.items():
            if own in _definitions():
                _write_definition(Path(directory), own, files)
        if kind == "task" and name not in local:
            _write_definition(Path(directory), name, {})
        manager = _manager(directory, include_defaults=kind == "group")
        _check_safe(task, path)
        try:
            loaded = manager.load([name])
        except Exception as error:
            # Data sets and definitions raise errors of many kinds.
            where = f"{task_data or 'DIR'}/lm_eval/{name if kind == 'task' else 'TASK'}"
            raise UserError(
                f"{task} cannot be loaded: {one_line(error)[:300]}; put its data into {where}/SPLIT.jsonl (train, "
                "validation, test) and name the directory with --task_data, or use a machine that reaches the hub"
            ) from error
    _check_loaded(task, name, loaded)
    return loaded


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


def _local_data(task_data: str) -> dict[str, dict[str, str]]:
    """Returns {task: {split: file}} of the local copies."""
    root = Path(task_data).expanduser() / "lm_eval"
    if not task_data or not root.is_dir():
        return {}
    found = {d.name: {f.stem: str(f.resolve()) for f in sorted(d.glob("*.jsonl"))} for d in sorted(root.iterdir())}
    return {name: files for name, files in found.items() if files}


def _write_definition(directory: Path, name: str, files: dict[str, str]) -> None:
    """Writes a definition that is the harness's own but for the data. JSON is YAML, too."""
    kind, path = _definitions()[name]
    # Without the tag: the table of definitions would forget the tag's other tasks.
    definition: dict[str, Any] = {"include": str(path), kind: name, "tag": None}
    if files:
        definition |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    (directory / f"{name}.yaml").write_text(json.dumps(definition))


def _check_safe(task: str, path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    if load_yaml(path, resolve_func=False).get("unsafe_code"):
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
