"""A stage takes the time of its calls, at sizes between and beside those that are known."""

from collections import Counter

import pytest

from isheep_jax.planning.forecast import VALIDATION_SHARE, StepTimes
from isheep_jax.planning.schedule import StageSchedule
from isheep_jax.planning.step_time import StepTime


def at(compute: float, scatters: float = 0.0) -> StepTime:
    return StepTime(compute=compute, scatters=scatters)


TIMES = StepTimes(
    block=512,
    decode={100: [at(10, 4), at(12, 4)], 20: [at(6, 0.8), at(6.4, 0.8)]},
    prefill={512: at(1.0), 2048: at(4.0)},
    score={512: at(2.0)},
    train=at(30.0),
)


def test_stage_is_sum_of_its_calls_checked_by_hand():
    schedule = StageSchedule(
        decode=Counter({(100, 512): 3, (100, 1024): 2, (20, 512): 5}),
        prefill=Counter({512: 4, 1024: 1}),
        score=Counter({512: 1, 1024: 1}),
        updates=2,
        validations=3,
        host_seconds=0.5,
    )
    time = TIMES.stage(schedule)
    decode = 3 * (10 + 4) + 2 * (12 + 4) + 5 * (6 + 0.8)
    # A row of 1,024 is a third of the way from 512 to 2,048; scoring is known at one size only, and grows with it.
    prefill, score = 4 * 1.0 + 2.0, 2.0 + 4.0
    train = 30.0 * (2 + 3 * VALIDATION_SHARE)
    assert time.seconds == pytest.approx(decode + prefill + score + train + 0.5)
    assert (time.host, time.scatters) == pytest.approx((0.5, 3 * 4 + 2 * 4 + 5 * 0.8))


@pytest.mark.parametrize(
    ("slots", "positions", "seconds"),
    [
        (60, 512, (14 + 6.8) / 2),  # half way between 20 and 100 slots
        (100, 2048, 16 + 2 * 2.0),  # each block beyond the known ones takes as long as the last
        (100, 640, 14 + 2 / 4),  # a quarter of the way from one block to two
        (100, 0, 14 - 2.0),
        (10, 512, 6.8 - (14 - 6.8) / 8),
    ],
)
def test_decode_step_is_on_line_through_known_sizes(slots, positions, seconds):
    assert TIMES.decode_step(slots, positions).seconds == pytest.approx(seconds)


def test_no_part_of_a_small_step_is_below_zero():
    small = StepTimes(512, {8: [at(9.0)], 16: [at(19.0)]}, {}, {}, at(0.0))
    assert small.decode_step(0, 1).seconds == 0.0
