"""The prompts that wait for slots, taken from a list or a stream as late as possible."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from isheep_jax.decode.tokenization import TokenizedPrompt

T = TypeVar("T")

# Requests of a list that are sorted by length together; with many slots, as many as fill them twice. They are decoded
# together and end about together, so that a caller who keeps results in the order of the requests can keep them from
# time to time, and not only at the end.
_WINDOW = 2048


def windows(requests: Sequence[T], slots: int) -> Iterator[Sequence[T]]:
    """Yields the requests of a list some at a time. slots: of the settings; 0: not known."""
    size = max(_WINDOW, 2 * slots)
    return (requests[first : first + size] for first in range(0, len(requests), size))


def longest_first(prompts: Iterable[TokenizedPrompt], max_tokens: int, max_length: int) -> list[TokenizedPrompt]:
    """Returns prompts in the order in which they should be decoded, so that short ones fill the gaps at the end.

    Args:
        prompts: those of a window.
        max_tokens: new tokens of a prompt without a limit of its own.
        max_length: the most tokens of a prompt with what follows it.
    """

    def most(prompt: TokenizedPrompt) -> int:
        return min(prompt.length + (prompt.max_tokens or max_tokens), max_length)

    return sorted(prompts, key=lambda prompt: (prompt.prefix, -most(prompt), -len(prompt.suffix), prompt.id))


class PromptQueue:
    """Prompts in the order in which slots take them.

    pending: those that are known, in their order.
    is_exhausted: whether there are no others.
    """

    def __init__(self, source: Iterator[TokenizedPrompt | None]):
        """Takes prompts from `source`; None says that there is none before results have come out."""
        self._source = source
        self.pending: deque[TokenizedPrompt] = deque()
        self.is_exhausted = False

    @property
    def head(self) -> TokenizedPrompt | None:
        """The next prompt; None if none is known."""
        return self.pending[0] if self.pending else None

    def fill(self, count: int) -> None:
        """Makes `count` prompts known, or as many as there are now."""
        while len(self.pending) < count and not self.is_exhausted:
            try:
                prompt = next(self._source)
            except StopIteration:
                self.is_exhausted = True
                return
            if prompt is None:
                return
            self.pending.append(prompt)

    def take(self) -> TokenizedPrompt:
        """Removes the next prompt, which must be known, and returns it."""
        return self.pending.popleft()

    def same_prefix(self) -> Sequence[TokenizedPrompt]:
        """Returns the known prompts from the next one on that have its prefix."""
        together = []
        for prompt in self.pending:
            if prompt.prefix != self.pending[0].prefix:
                break
            together.append(prompt)
        return together
