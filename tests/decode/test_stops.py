import itertools

from isheep_jax.decode.stops import cut_at_stop, holds_stop, lookback

PIECES = ["", "a", "b", "ab", "\n", "\n\n", "Human", ":", "H", "uman:", " "]


def decode(tokens):
    return "".join(PIECES[token] for token in tokens)


def tokens(*pieces):
    return [PIECES.index(piece) for piece in pieces]


def test_text_is_cut_exactly_where_stop_string_begins():
    completion = tokens("a", "b", "\n", "H", "uman:", "a")
    assert cut_at_stop(decode, completion, ("\nHuman:",)) == ("ab", 2, "\nHuman:")


def test_token_that_reaches_into_stop_string_is_kept_but_its_text_is_cut():
    assert cut_at_stop(decode, tokens("a", "ab", "b"), ("bb",)) == ("aa", 2, "bb")


def test_no_stop_string_is_none():
    assert cut_at_stop(decode, tokens("a", "b"), ("ba", "\n")) is None


def test_stop_string_at_start_leaves_nothing():
    assert cut_at_stop(decode, tokens("\n\n", "a"), ("\n",)) == ("", 0, "\n")


def test_result_does_not_depend_on_when_text_is_searched():
    stop = ("ab\n", "b", "a:")
    for completion in itertools.product(tokens("a", "b", "ab", "\n", ":"), repeat=4):
        completion = list(completion)
        results = []
        for step in (1, 2, 3, 4):
            cut, searched = None, 0
            for end in [*range(step, 4, step), 4]:
                found = holds_stop(decode(completion[max(0, searched - lookback(stop)) : end]), stop)
                cut = cut_at_stop(decode, completion[:end], stop)
                assert found or cut is None
                if cut:
                    break
                searched = end
            results.append(cut)
        assert results == results[:1] * 4, (completion, results)
