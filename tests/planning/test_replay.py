"""The engine's schedule without devices: what it takes on a slice, for requests of an iteration's lengths."""

from dataclasses import replace

import numpy as np
import pytest

from isheep_jax.decode.cache import Sizing
from isheep_jax.planning.lengths import Lengths, draw, draw_endless
from isheep_jax.planning.replay import SupposedModel, replay_generation, replay_scoring
from isheep_jax.planning.schedule import Generation, Scoring

# A slice with 16 data shards, two slices of one, a GPU.
MODELS = {
    "70b": SupposedModel(Sizing("tpu", 16), 2048, 2304, 32, (17.6e9, 2560.0)),
    "8b": SupposedModel(Sizing("tpu", 2), 2048, 768, 32, (2e9, 8192.0)),
    "gpu": SupposedModel(Sizing("gpu", 1), 2048, 128, 32, (16e9, 131072.0)),
}
LENGTHS = Lengths()


@pytest.mark.parametrize("name", MODELS)
def test_slots_are_busy_while_prompts_wait_and_rows_hold_little_padding(name):
    model, count = MODELS[name], (2 if name == "70b" else 4) * MODELS[name].slots
    prompts, completions = draw(50, count, LENGTHS, most=400), draw(250, count, LENGTHS, most=1000)
    judged, scores = 200 + draw(280, count, LENGTHS, most=1000), np.full(count, 16)
    shots = draw(520, count, LENGTHS, spread=0.2)
    lists = replay_generation(Generation(shots, draw_endless(1000, count, LENGTHS), 1000, 64, stream=True), model)
    answers = replay_generation(Generation(prompts, completions, 1000), model)
    sampled = replay_generation(Generation(judged, scores, 16, 160), model)
    assert min(lists.slots_busy_before_tail, answers.slots_busy_before_tail) >= 0.85
    assert max(lists.padding, sampled.padding, replay_scoring(Scoring(judged), model).padding) <= 1.3


def test_every_token_is_sampled_once_and_steps_end_with_the_last():
    model = MODELS["gpu"]
    lengths = np.array([700, 3, 50, 1000])
    schedule = replay_generation(Generation(np.full(4, 10), lengths, 1000), model)
    assert schedule.busy_slot_steps == lengths.sum()
    assert schedule.steps == 1000
    assert schedule.prompt_tokens == 40


def test_each_sequence_is_read_as_far_as_it_goes_or_as_the_longest():
    """Two slots from position 100 on, for 8 and for 600 tokens: one block of 128, then, while a slot is idle, half."""
    prompts = Generation(np.full(2, 100), np.array([8, 600]), 1000)
    model = replace(MODELS["gpu"], slots=2, read_block=128)
    assert list(replay_generation(prompts, model).decode) == [(2, n) for n in (128, 256, 384, 512, 640, 768)]
    alone = replay_generation(prompts, replace(model, reads_sequences_alone=True)).decode
    assert list(alone) == [(2, n) for n in (128, 64, 192, 256, 320, 384)]


def test_tail_moves_to_fewer_slots_where_keys_are_much_of_a_step():
    completions = np.concatenate([np.full(700, 200), np.full(68, 900)])
    demand = Generation(np.full(768, 100), completions, 1000)
    assert {slots for slots, _ in replay_generation(demand, MODELS["8b"]).decode} == {768, 192}
    heavy = SupposedModel(Sizing("tpu", 2), 2048, 768, 32, (200e9, 8192.0))
    assert {slots for slots, _ in replay_generation(demand, heavy).decode} == {768}


def test_shards_get_prompts_of_like_length():
    """All compute rows of the same length in a call, so that one long row costs every shard as much."""
    model = MODELS["70b"]
    prompts = np.repeat(np.array([2000, 100]), [16, 2288])
    schedule = replay_generation(Generation(prompts, np.full(2304, 10), 10), model)
    assert schedule.padding < 1.35
