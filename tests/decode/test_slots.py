"""The host's table of slots: its columns stay in step, and the devices hear of what the host decides."""

import numpy as np

from isheep_jax.decode.device_slots import CACHE_POSITION, CHANGED, KEY, LAST_TOKEN, NOT_NUMBERS, REMAINING
from isheep_jax.decode.sampling import request_key
from isheep_jax.decode.slots import SlotTable
from isheep_jax.decode.tokenization import TokenizedPrompt

EOS = (1,)


def prompt(name: str, *tokens: int) -> TokenizedPrompt:
    return TokenizedPrompt(name, (), np.asarray(tokens, np.int32), request_key(0, name), 0)


def filled() -> tuple[SlotTable, list[TokenizedPrompt]]:
    """Four slots, of which the second is idle."""
    table, prompts = SlotTable(4, 8, logprobs=False), [prompt("a", 5), prompt("c", 6, 7), prompt("d", 8)]
    for slot, owner in zip((0, 2, 3), prompts):
        table.admit(slot, owner, 4)
    return table, prompts


def outputs(*rows: tuple[int, ...]) -> np.ndarray:
    return np.asarray([rows], np.int32)


def test_admitted_prompt_is_sent_with_next_updates_alone():
    table, prompts = filled()
    assert (table.busy, table.idle) == ([0, 2, 3], [1])
    updates = table.take_updates()
    row = updates[2]
    assert (row[LAST_TOKEN], row[CACHE_POSITION], row[REMAINING], row[CHANGED]) == (7, 1, 4, 1)
    np.testing.assert_array_equal(row[KEY].view(np.uint32), prompts[1].key)
    assert not updates[1].any()
    assert not table.take_updates().any()


def test_new_tokens_follow_earlier_ones_until_end_token():
    table, _ = filled()
    new, ended, failed = table.append(outputs((9, 9), (-1, -1), (3, -1), (2, 1)), table.tenant, EOS)
    assert (new.tolist(), ended.tolist()) == ([2, 0, 1, 2], [False, False, False, True])
    assert not failed.any()
    assert table.remaining.tolist() == [2, 0, 3, 0]
    new, *_ = table.append(outputs((8, -1), (-1, -1), (4, 5), (-1, -1)), table.tenant, EOS)
    assert new.tolist() == [1, 0, 2, 0]
    assert table.tokens[0, :3].tolist() == [9, 9, 8]
    assert table.tokens[2, :3].tolist() == [3, 4, 5]
    assert table.count.tolist() == [3, 0, 3, 2]


def test_slot_whose_logits_are_not_numbers_has_failed_and_is_stopped():
    table, _ = filled()
    new, _, failed = table.append(outputs((9, NOT_NUMBERS), (-1, -1), (3, 1), (2, 2)), table.tenant, EOS)
    assert (new.tolist(), failed.tolist()) == ([1, 0, 2, 2], [True, False, False, False])
    table.take_updates()
    table.release(0)
    assert table.take_updates()[:, CHANGED].tolist() == [1, 0, 0, 0]


def test_tokens_of_finished_sequence_are_dropped_when_its_slot_has_another_owner():
    table, _ = filled()
    before = table.tenant.copy()
    table.release(0)
    table.admit(0, prompt("e", 9), 4)
    new, *_ = table.append(outputs((7, 7), (-1, -1), (3, 3), (-1, -1)), before, EOS)
    assert new.tolist() == [0, 0, 2, 0]
    assert table.remaining[0] == 4


def test_released_slot_is_stopped_on_devices_only_if_it_would_go_on():
    table, _ = filled()
    table.append(outputs((9, 9), (-1, -1), (3, 1), (2, 2)), table.tenant, EOS)
    table.take_updates()
    table.release(0)
    table.release(2)
    updates = table.take_updates()
    assert updates[:, CHANGED].tolist() == [1, 0, 0, 0]
    assert updates[0, REMAINING] == 0
    assert table.busy == [3]


def test_kept_slots_keep_all_their_columns():
    table, prompts = filled()
    table.append(outputs((9, 9), (-1, -1), (3, -1), (2, 2)), table.tenant, EOS)
    table.keep(np.asarray([3, 0], np.int32))
    assert len(table) == 2
    assert table.owner == [prompts[2], prompts[0]]
    assert table.tokens[:, 0].tolist() == [2, 9]
    assert table.updates[:, LAST_TOKEN].tolist() == [8, 5]
    assert (table.count.tolist(), table.remaining.tolist()) == ([2, 2], [2, 2])
    assert len(table.logprobs) == 2
    assert table.busy == [0, 1]
    assert table.longest(1) == 4


def test_logprobs_are_float_bits_of_second_output():
    table = SlotTable(1, 8, logprobs=True)
    table.admit(0, prompt("a", 5), 4)
    bits = np.asarray([[-0.5, -2.0]], np.float32).view(np.int32)
    table.append(np.stack([np.asarray([[9, -1]], np.int32), bits]), table.tenant, EOS)
    assert table.logprobs[0, :2].tolist() == [-0.5, 0.0]
