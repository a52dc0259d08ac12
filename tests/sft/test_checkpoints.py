import gc
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from small_model import same_bits

from isheep_jax.errors import UserError
from isheep_jax.sft.checkpoints import Checkpoints
from isheep_jax.sft.checkpoints import _checksums as checksums

FINGERPRINT = {"seed": 1, "sft.learning_rate": 0.1}


def weights(value: float, rank: int = 4) -> dict:
    value = jnp.float32(value)
    return {"layers": {"wq": {"a": jnp.full((2, 3, rank), value), "b": jnp.full((2, rank, 3), value)}}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(checkpoints, step, best_step=None):
    checkpoints.save(step, weights(step), {"count": jnp.int32(step)}, {"losses": [0.5] * step}, best_step)
    checkpoints.wait()


def restore(checkpoints, rank=4):
    return checkpoints.restore(abstract(weights(0, rank)), abstract({"count": jnp.int32(0)}))


def steps(directory) -> set[str]:
    return {p.name for p in directory.iterdir()}


def test_nothing_is_restored_from_empty_directory(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        assert restore(checkpoints) is None


def test_newest_checkpoint_comes_back_whole(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1), save(checkpoints, 2)
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        step, found, optimizer, progress = restore(checkpoints)
    assert (step, int(optimizer["count"]), progress) == (2, 2, {"losses": [0.5, 0.5]})
    assert same_bits(found, weights(2))


def test_newest_and_best_stay(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
            save(checkpoints, step, best)
        assert same_bits(checkpoints.weights(2, abstract(weights(0))), weights(2))
    assert steps(tmp_path) == {"2", "4"}


def test_without_best_one_only_newest_stays(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1), save(checkpoints, 2)
    assert steps(tmp_path) == {"2"}


def test_another_setting_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1)
    with (
        Checkpoints(tmp_path, FINGERPRINT | {"sft.learning_rate": 0.2}) as checkpoints,
        pytest.raises(UserError, match=r"sft.learning_rate is 0.1 in this checkpoint and 0.2 now"),
    ):
        restore(checkpoints)


def test_another_shape_is_refused_with_its_path(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1)
    with (
        Checkpoints(tmp_path, FINGERPRINT) as checkpoints,
        pytest.raises(UserError, match=r"weights/layers/wq/a is float32\[2, 3, 4\] in this .* float32\[2, 3, 8\] in"),
    ):
        restore(checkpoints, rank=8)


def test_missing_leaf_is_refused_with_its_path(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1)
        wanted = abstract(weights(0)) | {"lm_head": jax.ShapeDtypeStruct((3,), jnp.float32)}
        with pytest.raises(UserError, match="weights/lm_head is absent in this checkpoint"):
            checkpoints.restore(wanted, abstract({"count": jnp.int32(0)}))


def test_directory_that_is_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: checkpoints cannot be written here"):
        Checkpoints(tmp_path / "file", FINGERPRINT)


def test_checkpoint_whose_deletion_was_interrupted_is_no_obstacle(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 2, 2), save(checkpoints, 4, 2)
    (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(tmp_path / "2" / "weights")
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        assert restore(checkpoints)[0] == 4
        save(checkpoints, 6, 6)
    assert steps(tmp_path) == {"6"}


def test_progress_is_one_readable_file(tmp_path):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 3)
    stored = json.loads((tmp_path / "3" / "progress" / "data.json").read_text())
    assert stored.keys() == {"fingerprint", "checksums", "losses", "sha256"}
    assert (stored["fingerprint"], stored["losses"]) == (FINGERPRINT, [0.5, 0.5, 0.5])


def damaged_restores(directory, files, damage):
    """Damages one file after the other; returns what is restored each time: the step, or the error."""
    results = {}
    for path in files:
        copy = directory.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        target = copy / path.relative_to(directory)
        damage(target)
        try:
            with Checkpoints(copy, FINGERPRINT) as checkpoints:
                found = restore(checkpoints)
                if found is not None:
                    assert same_bits(found[1], weights(3)), path
                    assert found[3] == {"losses": [0.5] * 3}, path
                results[str(path.relative_to(directory))] = found and found[0]
        except UserError as error:
            is_good = "\n" not in str(error) and str(copy / "3") in str(error)
            results[str(path.relative_to(directory))] = "refused" if is_good else str(error)
    return results


def flip(path, at):
    data = path.read_bytes()
    if data:
        at %= len(data)
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoint_is_refused_in_one_line_or_restored_as_it_was(tmp_path, caplog):
    with Checkpoints(tmp_path / "whole", FINGERPRINT) as checkpoints:
        save(checkpoints, 3)
    files = [p for p in sorted((tmp_path / "whole").rglob("*")) if p.is_file()]
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink(), lambda p: flip(p, -20)):
        results = damaged_restores(tmp_path / "whole", files, damage)
        assert set(results.values()) <= {"refused", 3, None}
        assert results["3/progress/data.json"] == "refused"
    gc.collect()  # of tasks whose errors nobody has asked for
    assert caplog.records == []


def test_array_that_changed_in_the_store_is_refused_by_its_name(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, FINGERPRINT) as checkpoints:
        save(checkpoints, 1)
        load = checkpoints._checkpointer.load_checkpointables

        def loaded(step, items):
            found = load(step, items)
            if "weights" in items:
                found["weights"]["layers"]["wq"]["b"] = (
                    found["weights"]["layers"]["wq"]["b"].at[0, 0, 0].set(1 + 2**-23)
                )
            return found

        monkeypatch.setattr(checkpoints._checkpointer, "load_checkpointables", loaded)
        with pytest.raises(UserError, match="1 is damaged: weights/layers/wq/b is not what was saved"):
            restore(checkpoints)


def test_checksums_do_not_depend_on_dtype_widths_or_signs():
    tree = {"a": jnp.bfloat16(-1.5), "b": jnp.arange(3, dtype=jnp.int32), "c": jnp.array([True]), "d": jnp.uint8(7)}
    assert checksums(tree) == [0xBFC0, 3, 1, 7]


# A loop of events that ends while an array is still being written, as Orbax's does when another array has failed.
LATE_ARRAY = """
import asyncio, sys
import numpy as np
import tensorstore
import isheep_jax.sft.checkpoints

store = {"driver": "zarr", "kvstore": f"file://{sys.argv[1]}/"}
array = tensorstore.open(store, create=True, dtype=tensorstore.float32, shape=[4000, 4000]).result()
loop = asyncio.new_event_loop()
writing = array.write(np.random.default_rng(0).random((4000, 4000), np.float32))


async def wait():
    await writing


task = loop.create_task(wait())
loop.call_soon(loop.stop)
loop.run_forever()
assert not writing.done()
loop.close()
writing.result()
print("written")
"""


def test_array_that_is_late_for_a_save_that_failed_prints_nothing(tmp_path):
    command = [sys.executable, "-c", LATE_ARRAY, str(tmp_path / "array")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.stdout == "written\n"
    assert "Event loop is closed" not in result.stderr
