"""Requests per second of prompts and completions of one length."""

from dataclasses import replace

import pytest

from isheep_jax.decode.cache import Sizing
from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.iteration import Bounds
from isheep_jax.planning.replay import SupposedModel
from isheep_jax.planning.serving import Shape, parse_shape, throughput
from isheep_jax.planning.step_time import StepTime
from isheep_jax.presets import replace_settings

MODEL = SupposedModel(Sizing("tpu", 2), 2048, 64, 32, (2e9, 8192.0))
CONFIG = replace_settings(named_config("llama_8b_v5e"), {"decode.slots": 64})


def test_shape_is_prompt_and_completion():
    assert parse_shape("1800/128", CONFIG) == Shape(1800, 128)


@pytest.mark.parametrize("text", ["", "1800", "1800/", "a/b", "0/5", "5/0", "1/2/3"])
def test_malformed_shape_says_what_would_be_right(text):
    with pytest.raises(UserError, match=r"--shape: .* is not PROMPT/NEW, .*1800/128"):
        parse_shape(text, CONFIG)


def test_shape_that_does_not_fit_cache_names_both_numbers():
    with pytest.raises(UserError, match=r"--shape: 2000/128 takes 2128 tokens, more than decode.max_length=2048"):
        parse_shape("2000/128", CONFIG)


def test_all_slots_are_prefilled_and_decoded_in_as_many_steps_as_completion_has_tokens():
    bounds = Bounds({programs.PREFILL: Bound(0.5, "compute", 0.5, 0.0, 0.0)}, lambda positions: positions / 1e5)
    times = StepTimes(
        512, {64: [StepTime(compute=0.02 * b) for b in (1, 2, 3, 4)]}, {2048: StepTime(compute=0.3)}, {}, StepTime()
    )
    result = throughput(Shape(1800, 128), CONFIG, 4096, bounds, model=MODEL, times=times)
    # A decode step reads 1,864.5 keys of each slot on average, and a prefill step takes 4,096 tokens.
    assert result.bound == pytest.approx(64 / (128 * 1864.5 / 1e5 + 64 * 1800 / 4096 * 0.5))
    # A prompt fills a row of 2,048, of which a call takes two; decoding reads four blocks.
    assert result.forecast == pytest.approx(64 / (128 * 0.08 + 32 * 0.3))
    # Each sequence alone, in blocks of 256: 93 tokens read 1,792 positions and 35 read 2,048, 1,862 on average (1,856).
    alone = replace(MODEL, read_block=256, reads_sequences_alone=True)
    result = throughput(Shape(1700, 128), CONFIG, 4096, bounds, model=alone, times=times)
    assert result.forecast == pytest.approx(64 / (128 * 0.02 * 1856 / 512 + 32 * 0.3))


def test_short_prompts_share_rows():
    bounds = Bounds({programs.PREFILL: Bound(0.0, "compute", 0.0, 0.0, 0.0)}, lambda positions: 1e-3)
    times = StepTimes(512, {64: [StepTime()]}, {512: StepTime(compute=1.0)}, {}, StepTime())
    result = throughput(Shape(100, 10), CONFIG, 4096, bounds, model=MODEL, times=times)
    assert result.forecast == pytest.approx(64 / (64 / 2 / 4))
