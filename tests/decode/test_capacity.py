"""Slots and caches by memory, what comes first, and what is counted."""

import copy
import dataclasses

import pytest
from meshes import mesh_of
from minute_model import ARCHITECTURE, make_engine, ragged

from isheep_jax.decode import capacity
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.errors import UserError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
# Bytes of a slot of 128 tokens: keys and values in float32, and the logits while a token is sampled.
ROW = 2 * 4 * ARCHITECTURE.layers * ARCHITECTURE.kv_heads * ARCHITECTURE.head_dim * 128 + 16 * ARCHITECTURE.vocab_size


@pytest.fixture
def shape(params):
    return dataclasses.replace(make_engine(params).model.nominal_shape, cache_length=128)


def memory_for(monkeypatch, shape, slots: int) -> None:
    """Gives the device memory for the weights and so many slots."""
    weights = capacity._bytes(capacity.abstract_weights(shape.architecture, shape.weights_dtype, shape.compute_dtype))
    monkeypatch.setattr(capacity, "local_memory", lambda device: (weights + slots * ROW + 1) / capacity._HOST_FRACTION)


@pytest.mark.parametrize(("room", "slots"), [(1, 1), (5, 5), (39, 32), (100, 96), (255, 224), (10_000, 256)])
def test_slots_fill_memory_in_four_sizes_for_each_power_of_two(monkeypatch, shape, room, slots):
    memory_for(monkeypatch, shape, room)
    assert capacity.fitting_slots(shape, useful=10_000) == slots


def test_int8_cache_gives_more_slots(monkeypatch, shape):
    memory_for(monkeypatch, shape, 32)
    more = capacity.fitting_slots(dataclasses.replace(shape, kv_cache_dtype="int8"), useful=10_000)
    assert more > capacity.fitting_slots(shape, useful=10_000) == 32


def test_no_more_slots_than_can_be_busy_but_always_some_tens(monkeypatch, shape):
    memory_for(monkeypatch, shape, 200)
    assert [capacity.fitting_slots(shape, useful) for useful in (1, 32, 50, 1000)] == [32, 32, 48, 192]


def test_every_data_shard_has_its_own_slots(monkeypatch, shape):
    memory_for(monkeypatch, shape, 40)
    assert capacity.fitting_slots(dataclasses.replace(shape, mesh=mesh_of((2, 1, 1))), useful=10_000) == 80


def test_no_room_for_one_sequence_names_setting(monkeypatch, shape):
    memory_for(monkeypatch, shape, 0)
    with pytest.raises(UserError, match=r"decode\.max_length: one sequence of 128 tokens"):
        capacity.fitting_slots(shape, useful=1)


def test_tokens_are_the_same_with_slots_and_length_left_to_memory(params):
    requests = [r for r in ragged(40) if len(r.prompt) < 30]
    runs = [
        {c.id: c for c in make_engine(params, **settings).generate(requests, GREEDY)}
        for settings in ({"slots": 32, "max_length": 48}, {"slots": 0, "max_length": 0})
    ]
    assert runs[0] == runs[1]


def test_what_is_counted_is_what_was_done(params):
    requests = [dataclasses.replace(r, max_tokens=3 + i % 4) for i, r in enumerate(ragged(9))]
    engine = make_engine(params, slots=4, steps_per_call=2)
    list(engine.generate(requests[:4], GREEDY))
    before = copy.copy(engine.statistics)
    completions = list(engine.generate(requests, GREEDY))
    done = engine.statistics - before
    # End tokens are sampled, too.
    sampled = sum(len(c.tokens) + (c.finish_reason == "stop") for c in completions)
    assert (done.slots, done.sampled_tokens, done.slot_steps) == (4, sampled, 4 * done.steps)
    assert done.prompt_tokens == sum(len(engine.model.tokenizer.encode(r.prompt)) for r in requests)
    assert done.prompt_tokens < done.padded_prompt_tokens
    assert done.occupancy == sampled / done.slot_steps <= 1
    assert -(-done.steps // 2) <= done.calls <= done.steps
    assert done.idle_seconds > 0


def test_requests_that_may_take_longest_come_first(params):
    # One long completion among short ones: begun last, it would go on alone.
    lengths = [4] * 11 + [40]
    requests = [Request(f"r{i}", "a", max_tokens=n) for i, n in enumerate(lengths)]
    engine = make_engine(params, slots=4, steps_per_call=4)
    endless = dataclasses.replace(engine.model.nominal_shape, eos_ids=())
    engine.model = dataclasses.replace(engine.model, eos_ids=(), nominal_shape=endless)
    completions = list(engine.generate(requests, SamplingParams(temperature=1.0)))
    assert sorted(len(c.tokens) for c in completions) == lengths
    assert engine.statistics.steps == 40
