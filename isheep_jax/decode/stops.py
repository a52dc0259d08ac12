"""Stop strings: found on decoded text, so that they may span tokens; and how much of a growing text is settled."""

from collections.abc import Callable, Sequence


def _fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The smallest count in low..high that is enough, given that `high` is and that more never hurts."""
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def cut_at_stop(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], stop: Sequence[str], searched: int
) -> tuple[str, int] | None:
    """Text before the stop string that a growing completion met first, and the count of the tokens that carry it.

    tokens: the completion so far, of which the first `searched` are known to hold no stop string. Returns None where
    none is found. The result is that of looking after every token, so it does not depend on when one looks: the stop
    string that is complete after the fewest tokens wins, among several the one that begins first. The last token that
    is kept may reach into the stop string.
    """
    if not any(string in (text := decode(tokens)) for string in stop):
        return None

    def holds_stop(count: int) -> bool:
        return any(string in decode(tokens[:count]) for string in stop)

    text = decode(tokens[: _fewest(searched + 1, len(tokens), holds_stop)])
    text = text[: min(text.index(string) for string in stop if string in text)]
    return text, _fewest(0, len(tokens), lambda count: len(decode(tokens[:count])) >= len(text))


_INVALID = "\ufffd"


def lone_byte(decode: Callable[[Sequence[int]], str], vocab_size: int) -> int | None:
    """The first token that is one byte of a longer UTF-8 sequence; None where the tokenizer has no such tokens."""
    return next((token for token in range(vocab_size) if decode([token]) == _INVALID), None)


def settled_text(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], stop: Sequence[str], byte: int | None
) -> str:
    """The part of a growing completion's text that no later token can change or cut off.

    tokens: the completion so far, which holds no stop string. byte: a token from `lone_byte`. Held back are bytes of a
    UTF-8 sequence that may go on, and an ending with which a stop string may begin.
    """
    text = decode(tokens)
    if byte is not None:
        # Some decoders replace a whole run of byte tokens, also its complete characters, when the run ends badly. A
        # stray byte is such an end: what it changes is not settled.
        other = decode([*tokens, byte])
        text = text[: next((i for i, (a, b) in enumerate(zip(text, other)) if a != b), min(len(text), len(other)))]
    text = text.rstrip(_INVALID)
    earliest = max(0, len(text) - max(map(len, stop), default=0))
    starts = (i for i in range(earliest, len(text)) if any(string.startswith(text[i:]) for string in stop))
    return text[: next(starts, len(text))]
