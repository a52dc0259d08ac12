"""The schedule of a stage says how full its slots and rows are."""

from collections import Counter

import pytest

from isheep_jax.planning.schedule import StageSchedule


def test_slots_busy_are_weighed_by_their_number():
    schedule = StageSchedule(decode=Counter({(8, 512): 10, (4, 1024): 5}), busy_slot_steps=75)
    assert schedule.steps == 15
    assert schedule.slots_busy == pytest.approx(75 / 100)


def test_padding_is_row_tokens_per_needed_token():
    assert StageSchedule(row_tokens=1280, prompt_tokens=1000).padding == pytest.approx(1.28)


def test_stage_without_decoding_or_prompts_wastes_nothing():
    assert (StageSchedule(updates=3).slots_busy, StageSchedule(updates=3).padding) == (1.0, 1.0)
