"""Training checkpoints with Orbax: weights, optimizer, position in the data and history, saved together.

A checkpoint has a checksum of each array, which is compared when it is restored: the files of arrays have none.
"""

import contextlib
import errno
import logging
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from isheep_jax import distributed
from isheep_jax.errors import UserError, one_line
from isheep_jax.files import check_seal, full_path, sealed

Tree = Any

_REMEDY = "restore it, or remove it to train again from the one before or from the beginning"
# Characters of a library's error that a message quotes.
_QUOTED = 200
# What a disk says that takes no more, or nothing at all.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Returns whether a line of the log is none of Orbax's, which logs what it raises, too, and in many lines."""
    return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_raised)

_report_unraisable = sys.unraisablehook


def _leave_out_late_arrays(unraisable: "sys.UnraisableHookArgs") -> None:
    """Reports an exception that nothing can catch, but for those of arrays whose save has failed by another one."""
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        _report_unraisable(unraisable)


sys.unraisablehook = _leave_out_late_arrays


class _LatestAndBest:
    """Orbax's preservation policy: the newest checkpoint and the one with the best validation loss stay."""

    best_step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        return [c is checkpoints[-1] or c.step == self.best_step for c in checkpoints]


class Checkpoints:
    """The checkpoints of one fine-tuning in `directory`; a context manager, so that the last save is never lost.

    A checkpoint of an update holds `weights` (what is trained: all weights, or the adapters), `optimizer` and
    `progress` (JSON values: position in the data, losses so far). `fingerprint` (a flat dict of JSON values) names
    everything that the course of training depends on; a checkpoint with another one is refused.
    """

    def __init__(self, directory: epath.PathLike, fingerprint: dict[str, Any]):
        directory = epath.Path(directory)
        self.directory = full_path(directory)
        self.fingerprint = fingerprint
        self._policy = _LatestAndBest()
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        # Without this Orbax takes a dict of numbers for a tree of arrays and writes each number to a file of its own.
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="progress")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=context,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(f"{directory}: checkpoints cannot be written here: {error.strerror or error}") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None and distributed.is_distributed():
            return  # Orbax waits at a barrier that the other processes may never reach
        with _full_disk_as_user_error(self.directory):
            self._checkpointer.close()

    def save(self, step: int, weights: Tree, optimizer: Tree, progress: dict, best_step: int | None) -> None:
        """Starts to save in the background. All checkpoints but this one and that of `best_step` are then deleted.

        Args:
            step: number of the update.
            weights: all weights, or the adapters.
            optimizer: optax's state.
            progress: JSON values: position in the data, losses so far.
            best_step: the update with the best validation loss; None: only this checkpoint stays.
        """
        self._policy.best_step = best_step
        arrays = {"weights": weights, "optimizer": optimizer}
        checksums = {name: _checksums(tree) for name, tree in arrays.items()}
        items = {
            **arrays,
            "progress": sealed({"fingerprint": self.fingerprint, "checksums": checksums, **progress}),
        }
        with _full_disk_as_user_error(self.directory):
            self._checkpointer.save_checkpointables_async(step, items, force=True, overwrite=True)

    def wait(self) -> None:
        """Waits until the last save has ended."""
        with _full_disk_as_user_error(self.directory):
            self._checkpointer.wait()

    def restore(self, weights: Tree, optimizer: Tree) -> tuple[int, Tree, Tree, dict] | None:
        """Returns (step, weights, optimizer, progress) of the newest checkpoint; None when there is none.

        weights, optimizer: trees of `jax.ShapeDtypeStruct` with the shardings of the result, which need not be those
        that were saved. Raises `UserError` that names the first setting or array in which the checkpoint differs, or
        the checkpoint if it is damaged.
        """
        if self._checkpointer.latest is None:
            return None
        step = self._checkpointer.latest.step
        progress, items = self._load(step, {"weights": weights, "optimizer": optimizer})
        return step, items["weights"], items["optimizer"], progress

    def weights(self, step: int, weights: Tree) -> Tree:
        """Returns the weights saved at `step`, in the shapes and shardings of `weights` (as in `restore`)."""
        self.wait()
        return self._load(step, {"weights": weights})[1]["weights"]

    def _load(self, step: int, expected: dict[str, Tree]) -> tuple[dict, dict[str, Tree]]:
        """Returns the progress and the trees of a checkpoint, compared with what was saved. Raises as `restore`."""
        path = self.directory / str(step)
        with _damage_as_user_error(path):
            progress = self._checkpointer.load_checkpointables(step, {"progress": None})["progress"]
            progress = dict(check_seal(progress, str(path), _REMEDY))
            _check_fingerprint(path, progress.pop("fingerprint"), self.fingerprint)
            stored = self._checkpointer.checkpointables_metadata(step).metadata
            for name, tree in expected.items():
                _check_tree(path, name, stored[name], tree)
            items = self._checkpointer.load_checkpointables(step, expected)
            checksums = progress.pop("checksums", {})
            for name, tree in items.items():
                _check_sums(path, name, checksums.get(name), tree)
        progress.pop("sha256", None)
        return progress, items


@contextlib.contextmanager
def _full_disk_as_user_error(directory: epath.Path):
    """Turns Orbax's errors about a disk that is full or cannot be written into one line that names the directory."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"{directory}: no space left on the disk for a checkpoint") from error
        if getattr(error, "errno", None) in _REFUSED:
            raise UserError(f"{directory}: a checkpoint cannot be written: {os.strerror(error.errno)}") from error
        raise


@contextlib.contextmanager
def _damage_as_user_error(checkpoint: epath.Path):
    """Turns whatever goes wrong when a checkpoint is read into one line that names it."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise  # too little memory, or the loss of another process
    except Exception as error:
        raise UserError(f"{checkpoint} cannot be read ({one_line(error)[:_QUOTED]}); {_REMEDY}") from error


def _checksums(tree: Tree) -> list[int]:
    """Returns the sum (modulo 2**32) of the bits of each array, read as whole numbers: no flipped bit leaves it alone.

    It is computed where the arrays are, and does not depend on how they are sharded.
    """
    return [int(value) for value in jax.device_get(_sums(tree))]


@jax.jit
def _sums(tree: Tree) -> jax.Array:
    def of(leaf: jax.Array) -> jax.Array:
        if leaf.dtype != bool:
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(leaf.astype(jnp.uint32), dtype=jnp.uint32)

    return jnp.stack([of(leaf) for leaf in jax.tree.leaves(tree)])


def _check_sums(checkpoint: epath.Path, name: str, expected: list[int] | None, tree: Tree) -> None:
    """Raises UserError where an array is not what was saved. expected: None for a checkpoint of an earlier version."""
    if expected is None:
        return
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for path, now, then in zip(paths, _checksums(tree), expected, strict=True):
        if now != then:
            raise UserError(f"{checkpoint} is damaged: {name}/{path} is not what was saved; {_REMEDY}")


def _check_fingerprint(checkpoint: epath.Path, stored: dict, expected: dict) -> None:
    for name in (*expected, *(n for n in stored if n not in expected)):
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"{checkpoint}: {name} is {stored.get(name)!r} in this checkpoint and {expected.get(name)!r} now; "
                "go on with the former, or take another directory"
            )


def _check_tree(checkpoint: epath.Path, name: str, stored: Tree, expected: Tree) -> None:
    stored, expected = _described(stored), _described(expected)
    for path in (*expected, *(p for p in stored if p not in expected)):
        if stored.get(path) != expected.get(path):
            raise UserError(
                f"{checkpoint}: {name}/{path} is {stored.get(path, 'absent')} in this checkpoint and "
                f"{expected.get(path, 'absent')} in this model: it is damaged, or another model's; {_REMEDY}"
            )


def _described(tree: Tree) -> dict[str, str]:
    """Returns dtype and shape by path. Orbax stores named tuples as dicts, so a path says only the bare names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for p, x in leaves}
