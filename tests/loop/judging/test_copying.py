"""Which tokens of a response are copied from the instruction."""

import pytest

from isheep_jax.loop.judging.copying import copied_tokens


def copied(text, *sources, words=2, spans=None):
    """The characters of the text that are copied, where each character is a token; others become dots."""
    spans = spans or [(i, i + 1) for i in range(len(text))]
    found = copied_tokens(sources, text, spans, words)
    return "".join(text[a:b] if own else "." * (b - a) for (a, b), own in zip(spans, found, strict=True))


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("Name three big rivers.", "Three rivers are big.", "....................."),
        ("Name three big rivers.", "Three big rivers are there.", "Three big rivers..........."),
        ("Write a poem about the sea.", "A poem: waves.", "A poem........"),
        ("one two", "two one one two", "........one two"),
        ("He said (twice): go home!", "said twice go, HOME", "said twice go, HOME"),
        ("翻译这个句子。", "这个是句子", "这个.句子"),
        ("Über die Brücke", "U\u0308ber die Bru\u0308cke", "U\u0308ber die Bru\u0308cke"),
        ("", "anything", "........"),
        ("word", "word", "...."),
    ],
)
def test_two_words_in_a_row_make_a_copy_whatever_their_case_and_what_is_between_them(source, text, expected):
    assert copied(text, source) == expected


def test_a_copy_does_not_reach_from_one_source_into_the_next():
    assert copied("red cat", "paint it red", "cat sits") == "......."
    assert copied("red cat", "paint it red cat") == "red cat"


def test_the_number_of_words_is_a_choice_and_none_copies_nothing():
    text, source = "the big red cat", "a big red dog"
    assert copied(text, source, words=1) == "....big.red...."
    assert copied(text, source, words=2) == "....big red...."
    assert copied(text, source, words=3) == copied(text, source, words=0) == "." * len(text)


def test_a_token_is_copied_as_a_whole_or_not_at_all():
    # " cats" begins within the copy and ends outside of it; " red" brings its space.
    spans = [(0, 4), (4, 8), (8, 12), (12, 13), (13, 14)]
    assert copied(" big red cats.", "a big red cat", spans=spans) == " big red......"
    # Tokens for parts of one character share it, and white space within the copy is copied.
    assert copied_tokens(["é é"], "é é ", [(0, 1), (0, 1), (1, 2), (2, 3), (3, 3), (3, 4)], words=2) == [
        *(True, True, True, True, False, False)
    ]


def test_three_words_in_a_row_make_a_copy_unless_said_otherwise():
    text = "a big red cat and a big dog"
    assert copied(text, "a big red dog", words=3) == "a big red.................."
    spans = [(i, i + 1) for i in range(len(text))]
    assert copied_tokens(["a big red dog"], text, spans) == copied_tokens(["a big red dog"], text, spans, words=3)
