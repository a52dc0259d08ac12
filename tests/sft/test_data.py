import json

import numpy as np
import pytest
from letter_tokenizer import LetterTokenizer
from small_model import copying, example

from isheep_jax.errors import UserError
from isheep_jax.sft import data
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT

SIZES = {"sequence_length": 32, "batch_size": 4}


def tokenized(examples, sequence_length=32):
    return data.tokenize(LetterTokenizer(), examples, sequence_length)


def unpacked(batches) -> list[tuple]:
    """(tokens, targets, loss mask) of every example in every batch, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                here = batch.segment_ids[row] == segment
                np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
                found.append(
                    tuple(tuple(x[row][here].tolist()) for x in (batch.tokens, batch.targets, batch.loss_mask))
                )
    return found


def test_only_response_and_end_of_turn_carry_loss():
    columns = tokenized([example("a", "abc", "de")]).columns[0]
    in_loss = columns[:, data.IN_LOSS] == 1
    assert columns[:, data.TOKEN].tolist() == [0, 3, 4, 5, 2, 6, 7]
    assert columns[in_loss, data.TARGET].tolist() == [6, 7, 1]


def test_embedded_models_tokenizer_trains_response_and_its_end():
    tokenizer = Tokenizer.load(CHECKPOINT)
    asked = example("a", "Repeat the words: RED BLUE", "RED BLUE")
    (columns,) = data.tokenize(tokenizer, [asked], 128).columns
    in_loss = columns[columns[:, data.IN_LOSS] == 1, data.TARGET]
    assert tokenizer.decode(in_loss).strip() == asked.response
    assert in_loss[-1] in tokenizer.eos_ids
    assert columns[: -len(in_loss), data.IN_LOSS].sum() == 0


def test_long_example_is_cut_and_counted_and_one_without_response_is_left_out():
    examples = [example("fits", "ab", "cd"), example("cut", "abc", "defg"), example("no response", "abcdefg", "h")]
    result = tokenized(examples, sequence_length=6)
    assert [len(c) for c in result.columns] == [6, 6]
    assert (result.cut, result.left_out) == (1, 1)


def test_example_that_the_chat_template_refuses_is_left_out_and_counted():
    class Refusing(LetterTokenizer):
        def encode_example(self, conversation, response):
            if response == "x":
                raise UserError("the chat template refuses x")
            return super().encode_example(conversation, response)

    examples = [example("a", "ab", "cd"), example("b", "ab", "x"), example("c", "ab", "ef")]
    result = data.tokenize(Refusing(), examples, 32)
    assert (len(result.columns), result.left_out, result.refusal) == (2, 1, "the chat template refuses x")
    assert data.tokenize(Refusing(), examples[::2], 32).refusal == ""


def test_every_epoch_holds_every_example_once_in_its_own_order():
    columns = tokenized(copying(30)).columns
    expected = sorted(tuple(map(tuple, c.T.tolist())) for c in columns)
    found = unpacked(data.batches(columns, epochs=2, shuffle_seed=5, **SIZES))
    assert sorted(found) == sorted(expected * 2)
    assert sorted(found[:30]) != found[:30]
    assert found[:30] != found[30:]


def test_seed_gives_one_order_and_another_seed_another():
    columns = tokenized(copying(30)).columns
    first, again, other = (unpacked(data.batches(columns, shuffle_seed=s, **SIZES)) for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_last_batch_is_filled_with_empty_rows():
    batches = list(data.batches(tokenized(copying(3)).columns, **SIZES))
    assert [b.tokens.shape for b in batches] == [(4, 32)]
    assert batches[0].segment_ids[-1].sum() == batches[0].loss_mask[-1].sum() == 0


def test_examples_share_rows():
    batches = list(data.batches(tokenized(copying(30)).columns, **SIZES))
    assert max(b.segment_ids.max() for b in batches) > 1


def test_without_packing_update_sees_as_many_examples_as_rows():
    columns = tokenized(copying(30)).columns
    batches = list(data.batches(columns, epochs=2, shuffle_seed=5, packing=False, **SIZES))
    # 60 examples in rows of their own, four to a batch.
    assert [int((b.segment_ids.max(axis=1) == 1).sum()) for b in batches] == [4] * 15
    found, packed = unpacked(batches), unpacked(data.batches(columns, epochs=2, shuffle_seed=5, **SIZES))
    assert sorted(found) == sorted(packed)
    assert all(
        (b.positions[b.segment_ids == 0] == 0).all() and not b.loss_mask[b.segment_ids == 0].any() for b in batches
    )


def test_without_packing_last_batch_is_filled_up_and_iterator_goes_on_from_its_state():
    dataset = data.batches(tokenized(copying(6)).columns, shuffle_seed=1, packing=False, **SIZES)
    assert [b.tokens.shape for b in dataset] == [(4, 32), (4, 32)]
    iterator = iter(dataset)
    next(iterator)
    later = iter(dataset)
    later.set_state(json.loads(json.dumps(iterator.get_state())))
    assert unpacked(later) == unpacked(iterator)


def test_count_is_number_of_batches():
    dataset = data.batches(tokenized(copying(30)).columns, epochs=3, shuffle_seed=1, **SIZES)
    assert data.count_batches(dataset) == len(list(dataset)) > 3


def test_iterator_goes_on_exactly_from_its_state():
    dataset = data.batches(tokenized(copying(50)).columns, epochs=2, shuffle_seed=1, **SIZES)
    iterator = iter(dataset)
    next(iterator), next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    later = iter(dataset)
    later.set_state(state)
    assert unpacked(later) == unpacked(iterator)


def test_held_out_examples_depend_on_ids_and_seed_only():
    examples = copying(20)
    training, held_out = data.split_examples(examples, 0.2, seed=1)
    _, reversed_held_out = data.split_examples(examples[::-1], 0.2, seed=1)
    _, other_seed = data.split_examples(examples, 0.2, seed=2)
    assert len(held_out) == 4
    assert {*training, *held_out} == set(examples)
    assert set(held_out) == set(reversed_held_out) != set(other_seed)


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(5, 0.0, 0), (5, 0.01, 1), (1, 0.5, 0), (2, 0.9, 1)])
def test_split_leaves_something_for_both_sides_where_it_can(count, fraction, held_out):
    training, validation = data.split_examples(copying(count), fraction, seed=0)
    assert (len(training), len(validation)) == (count - held_out, held_out)
