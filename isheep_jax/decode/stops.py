"""Finds stop strings in decoded text, because they may span tokens, and the stable part of a text that is streamed."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

# Decoders put this character for bytes that are no valid UTF-8.
_INVALID = "\ufffd"
# Tokens before those that may hold a stop string: their text may be cut in the middle of a character, or be none.
_MARGIN = 16


def lookback(stop: Sequence[str]) -> int:
    """Returns how many tokens before new ones have to be decoded with them to find a stop string that they complete.

    So many can the longest one span, so that the work does not grow with the completion. The text of a part may differ
    from that part of the text, so that `cut_at_stop` has the last word, and an ended completion is searched whole.
    """
    return max((len(string.encode()) for string in stop), default=0) + _MARGIN


def holds_stop(text: str, stop: Sequence[str]) -> bool:
    """Returns whether a text has a stop string."""
    return any(string in text for string in stop)


def cut_at_stop(decode: Decode, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, int, str] | None:
    """Returns the text before the first stop string, how many tokens it takes, and the string; None without one.

    The first stop string is the one that is complete after the fewest tokens; among several, the one that begins first.
    So the result is the same however many tokens arrive between two searches. The last token that is kept may reach
    into the stop string.

    Args:
        decode: text of token ids.
        tokens: the completion so far.
        stop: stop strings.
    """

    if not holds_stop(decode(tokens), stop):
        return None
    text = decode(tokens[: _first_true(1, len(tokens), lambda count: holds_stop(decode(tokens[:count]), stop))])
    start, found = min(((text.index(string), string) for string in stop if string in text), key=lambda pair: pair[0])
    kept = _first_true(0, len(tokens), lambda count: len(decode(tokens[:count])) >= start)
    return text[:start], kept, found


def incomplete_utf8_token(decode: Decode, vocab_size: int) -> int | None:
    """Returns the first token that is one byte of a longer UTF-8 sequence; None for tokenizers without such tokens."""
    return next((token for token in range(vocab_size) if decode([token]) == _INVALID), None)


def stable_text(decode: Decode, tokens: Sequence[int], stop: Sequence[str], incomplete: int | None) -> str:
    """Returns the part of a growing completion's text that no later token can change or cut off.

    Held back are the bytes of an incomplete UTF-8 sequence and an ending that a stop string may begin with.

    Args:
        decode: text of token ids.
        tokens: the completion so far; it holds no stop string.
        stop: stop strings.
        incomplete: the token from `incomplete_utf8_token`.
    """
    text = decode(tokens)
    if incomplete is not None:
        # Some decoders replace a whole run of byte tokens, its complete characters too, if the run ends in an invalid
        # byte. What one more stray byte would change is therefore not stable.
        text = text[: _common_prefix_length(text, decode([*tokens, incomplete]))]
    text = text.rstrip(_INVALID)
    earliest = max(0, len(text) - max(map(len, stop), default=0))
    starts = (i for i in range(earliest, len(text)) if any(string.startswith(text[i:]) for string in stop))
    return text[: next(starts, len(text))]


def _first_true(low: int, high: int, condition: Callable[[int], bool]) -> int:
    """Returns the smallest count in low..high that meets the condition, as do all larger ones and `high`."""
    while low < high:
        middle = (low + high) // 2
        if condition(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _common_prefix_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
