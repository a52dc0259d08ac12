"""What does not fit says so in numbers, in fields and in one line."""

import numpy as np
import pytest
from minute_model import TableTokenizer

from isheep_jax.decode.requests import Request
from isheep_jax.decode.tokenization import PromptError, TooLong, tokenize

PREFIX = "the quick brown fox jumps over 13 lazy dogs. "


def tokens_of(request, **settings):
    return tokenize(TableTokenizer(), request, **{"seed": 0, "max_length": 64, "spare": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spare": 0}, "the prompt has 65 tokens; decode.max_length=64 must hold it (at most the model's context)"),
        (
            {"spare": 1},
            "the prompt has 65 tokens; decode.max_length=64 must hold it and a new token (at most the model's context)",
        ),
        (
            {"spare": 3},
            "the prompt has 65 tokens; decode.max_length=64 must hold it and 3 more (at most the model's context)",
        ),
        (
            {"spare": 3, "continuation": "its longest choice"},
            "the prompt has 65 tokens and its longest choice 3; decode.max_length=64 must hold both",
        ),
    ],
)
def test_misfit_tells_tokens_and_setting_in_fields_and_in_one_line(settings, message):
    with pytest.raises(TooLong) as error:
        tokens_of(Request("a", "7" * 64), **settings)
    assert str(error.value) == message
    assert (error.value.tokens, error.value.spare, error.value.max_length) == (65, settings["spare"], 64)


def test_prompt_that_just_fits_is_taken():
    assert tokens_of(Request("a", "7" * 62)).length == 63


def test_empty_prompt_is_an_error_of_its_own():
    class Empty(TableTokenizer):
        def encode_prompt(self, prompt):
            return []

    with pytest.raises(PromptError, match=r"^the prompt is empty$"):
        tokenize(Empty(), Request("a", ""), seed=0, max_length=64, spare=1)


def test_prefix_and_suffix_join_to_whole_prompt():
    whole = TableTokenizer().encode(PREFIX + "ab")
    prompt = tokens_of(Request("a", PREFIX + "ab", PREFIX))
    assert prompt.prefix
    np.testing.assert_array_equal([*prompt.prefix, *prompt.suffix], whole)


@pytest.mark.parametrize("prefix", ["short", "another beginning than that of the prompt but long"])
def test_prefix_that_is_short_or_not_of_prompt_is_not_split_off(prefix):
    assert tokens_of(Request("a", PREFIX + "ab", prefix)).prefix == ()
