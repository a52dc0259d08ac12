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
    assert manifest.keys() == {"counts", "parts", "config", "seconds", "sha256"}
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
    with pytest.raises(UserError, match=r"cannot write .*parts.json: No space left on device; .* go on") as e:
        stage(tmp_path).write_part(0, pairs(2))
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        at = int(how)
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.parametrize("how", ["cut", "emptied", "0", "10", "-2"])
def test_damaged_part_before_done_is_made_again_with_those_after_it(tmp_path, how):
    s = stage(tmp_path)
    for index in range(3):
        s.write_part(index, pairs(2))
    damage(tmp_path / "part-00001.jsonl", how)
    again = stage(tmp_path)
    assert (again.parts(), again.damaged) == ([pairs(2)], "part-00001.jsonl")
    assert sorted(p.name for p in tmp_path.glob("part-*")) == ["part-00000.jsonl"]
    again.write_part(1, pairs(3))
    again.finish({})
    assert stage(tmp_path).parts() == [pairs(2), pairs(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["DONE", "part-00000.jsonl", "part-00001.jsonl"]


def test_part_that_is_missing_before_done_is_made_again_with_those_after_it(tmp_path):
    s = stage(tmp_path)
    for index in range(3):
        s.write_part(index, pairs(2))
    (tmp_path / "part-00001.jsonl").unlink()
    assert stage(tmp_path).parts() == [pairs(2)]
    assert sorted(p.name for p in tmp_path.glob("part-*")) == ["part-00000.jsonl"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"part-00000.jsonl": 1}'])
def test_where_the_digests_are_damaged_no_part_is_used(tmp_path, content):
    stage(tmp_path).write_part(0, pairs(2))
    (tmp_path / "parts.json").write_text(content)
    assert stage(tmp_path).parts() == []


def test_parts_of_a_version_without_digests_are_used(tmp_path):
    stage(tmp_path).write_part(0, pairs(2))
    (tmp_path / "parts.json").unlink()
    again = stage(tmp_path)
    assert again.parts() == [pairs(2)]
    again.finish({})
    assert stage(tmp_path).records() == pairs(2)


def test_damage_between_writing_and_done_is_noticed(tmp_path):
    s = stage(tmp_path)
    s.write_part(0, pairs(2))
    damage(tmp_path / "part-00000.jsonl", "10")
    s.finish({})
    with pytest.raises(UserError, match=r"part-00000\.jsonl has changed since"):
        stage(tmp_path).records()


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_a_bit_that_flips_in_done_is_noticed(tmp_path, position):
    s = stage(tmp_path)
    s.write_part(0, pairs(2))
    s.finish({"records": 2})
    whole = (tmp_path / "DONE").read_bytes()
    damage(tmp_path / "DONE", str(position))
    if b"seconds" not in whole[position - 30 : position + 30]:
        with pytest.raises(UserError, match="DONE"):
            stage(tmp_path).records()


@pytest.mark.parametrize("content", ["", "[]", "1", "{}", '{"counts": [], "parts": {}, "config": "digest"}'])
def test_done_that_is_no_manifest_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "DONE").write_text(content)
    with pytest.raises(UserError, match="DONE") as error:
        stage(tmp_path).parts()
    assert "\n" not in str(error.value)
