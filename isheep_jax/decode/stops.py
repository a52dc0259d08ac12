"""Stop strings: found on decoded text, so that they may span tokens."""

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
