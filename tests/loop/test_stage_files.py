import errno
import json
import os

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop.records import KEPT, Pair
from isheep_jax.loop.stage_files import StageFiles


def pairs(n):
    return [Pair(f"1-{i:06d}-0", f"1-{i:06d}", "do", "", f"done {i}", KEPT) for i in range(n)]


def stage(path):
    return StageFiles(path, Pair, "digest")


def test_done_says_counts_parts_config_and_seconds(tmp_path):
    s = stage(tmp_path)
    s.write_part(0, pairs(2))
    assert s.done() is None
    s.finish({"records": 2})
    manifest = json.loads((tmp_path / "DONE").read_text())
    assert manifest.keys() == {"counts", "parts", "config", "seconds"}
    assert manifest["counts"] == {"records": 2}
    assert list(manifest["parts"]) == ["part-00000.jsonl"]


def test_a_part_that_changed_after_done_is_noticed(tmp_path):
    s = stage(tmp_path)
    s.write_part(0, pairs(2))
    s.finish({})
    (tmp_path / "part-00000.jsonl").write_text("")
    with pytest.raises(UserError, match=r"part-00000\.jsonl has changed since"):
        s.records()
    (tmp_path / "part-00000.jsonl").unlink()
    with pytest.raises(UserError, match=r"part-00000\.jsonl is missing"):
        s.records()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*part-00000.jsonl: No space left on device; .* go on") as e:
        stage(tmp_path).write_part(0, pairs(2))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []
