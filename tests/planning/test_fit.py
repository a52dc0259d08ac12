"""The search finds the largest count that fits."""

import dataclasses

import pytest

from isheep_jax.config import DecodeConfig, SFTConfig
from isheep_jax.named_configs import named_config
from isheep_jax.planning.fit import changes, largest


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 8, 64, 2000])
def test_largest_good_count_is_found_within_eighth(limit, start):
    found = largest(lambda n: n <= limit, start)
    assert found <= limit < found + max(1, found // 8) + 1


def test_no_count_is_good_when_one_is_too_many():
    assert largest(lambda n: False, 16) == 0


def test_search_ends_where_more_would_not_help():
    assert largest(lambda n: True, 16) == 1024


def test_changes_are_spelled_as_settings():
    before = named_config("tiny")
    after = dataclasses.replace(
        before,
        decode=DecodeConfig(**{**dataclasses.asdict(before.decode), "slots": 256}),
        sft=SFTConfig(**{**dataclasses.asdict(before.sft), "remat": "full"}),
    )
    assert changes(before, after) == ["--decode.slots=256", "--sft.remat=full"]
