import pytest

from isheep_jax.loop.filters.normalization import normalize, tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't STOP, it's 3.5!", ["don", "t", "stop", "it", "s", "3", "5"]),
        ("snake_case-word", ["snake", "case", "word"]),
        ("Überprüfe die Größe", ["überprüfe", "die", "größe"]),
        ("U\u0308ber", ["über"]),
        ("写一首诗 about 3 birds", ["写", "一", "首", "诗", "about", "3", "birds"]),
        ("ひらがな", ["ひ", "ら", "が", "な"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("?!", []),
    ],
)
def test_tokens_are_words_of_any_script(text, tokens):
    assert tokenize(text) == tokens


def test_the_same_instruction_in_another_dress_is_the_same():
    assert normalize("Count the WORDS: a, b!") == normalize("count the words a b")
