import json

import pytest
from scripted_backend import context_of, tiny_config

from isheep_jax.loop.records import KEPT, Pair, kept


def pairs(n):
    return [Pair(f"1-{i:06d}-0", f"1-{i:06d}", "do", "", f"done {i}", KEPT) for i in range(n)]


def make(context, items, *, order=reversed):
    """Makes one record per item, in blocks, each block in another order; returns the items that had none."""
    asked = []
    with context.open("responses", len(items)) as stage:
        for block in stage.blocks(items):
            asked += block
            for index, item in order(list(enumerate(block))):
                stage.put(index, item)
    assert stage.records == items
    return asked


@pytest.fixture
def context(tmp_path):
    return context_of(tiny_config(tmp_path))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "iteration_1" / "responses"


def test_records_are_in_the_order_of_items_whatever_finishes_first(context, directory):
    assert make(context, pairs(600)) == pairs(600)
    assert context.files("responses").records() == pairs(600)
    assert sorted(p.name for p in directory.iterdir()) == ["DONE", *(f"part-0000{i}.jsonl" for i in range(3))]


def test_a_torn_file_is_removed_and_a_missing_part_made_again(context, directory):
    make(context, pairs(600))
    whole = (directory / "part-00002.jsonl").read_bytes()
    for name in ("part-00002.jsonl", "DONE"):
        (directory / name).unlink()
    (directory / ".part-00002.jsonl.tmp").write_bytes(whole[:50])
    assert make(context, pairs(600)) == pairs(600)[512:]
    # The reporter saw all 600 units: those of the parts in place at once.
    assert [done for *_, done in context.reporter.stages] == [600, 600]
    assert (directory / "part-00002.jsonl").read_bytes() == whole
    assert not list(directory.glob(".*"))


def test_a_finished_stage_is_not_made_again_and_not_shown(context):
    make(context, pairs(3))
    assert make(context, pairs(3)) == []
    assert len(context.reporter.stages) == 1


def test_a_stage_without_an_answer_to_each_request_fails(context, directory):
    with pytest.raises(RuntimeError, match="answered 2 of 3 requests"):
        make(context, pairs(3), order=lambda items: items[:2])
    assert not (directory / "DONE").exists()


def test_done_counts_what_was_kept_and_adds_the_figures_of_the_stage(context, directory):
    with context.open("responses", 2) as stage:
        for block in stage.blocks(pairs(2)):
            for index, item in enumerate(block):
                stage.put(index, item)
        stage.summary["longest"] = 6
    counts = json.loads((directory / "DONE").read_text())["counts"]
    assert counts == {"records": 2, "kept": len(kept(stage.records)), "dropped": {}, "longest": 6}


def test_ids_and_random_numbers_follow_from_iteration_and_purpose(context):
    assert context.request_id("respond", "1-000000", 0) == "1/respond/1-000000/0"
    assert context.random("select").random() == context.second_turn().random("select").random()
    assert context.random("select").random() != context.random("sample").random()


def test_a_second_turn_has_files_of_its_own(context, tmp_path):
    second = context.second_turn()
    assert second.files("responses").directory == tmp_path / "iteration_1" / "second_turn" / "responses"
    assert second.files("follow_ups").directory == tmp_path / "iteration_1" / "second_turn" / "instructions"
