"""Packs several prompts into one row of tokens, for prefill and for scoring."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isheep_jax.decode.cache import Sizing

# Columns of packed tokens [R, T, 4] (int32).
TOKEN = 0  # token id
POSITION = 1  # position in the prompt, counted after a shared prefix; -1: padding
SEGMENT = 2  # which prompt of the row, from 1; 0: padding
SLOT = 3  # slot whose cache row the token's keys and values go to; -1: none
COLUMNS = 4


@dataclass
class PackedRow:
    """A row that is being packed.

    length: tokens up to the end of the last prompt, rounded up to the alignment.
    prompts: index of each prompt.
    begins: where in the row each prompt begins.
    """

    length: int = 0
    prompts: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PackedBatch:
    """The packed rows of one device call, one for each data shard.

    rows: for each row its prompts in the order of their segments, and where in the row each begins; an empty row is
    padding.
    tokens: [R, T, 4] int32, see the columns above.
    """

    rows: tuple[tuple[tuple[Any, int], ...], ...]
    tokens: np.ndarray


def pack(lengths: Sequence[int], sizing: Sizing, total: int = 0) -> Iterator[PackedRow]:
    """Yields rows of packed prompts; the rows with the longest prompts first.

    A row takes the longest prompt that is left, and then repeatedly the longest one that still fits.

    Args:
        lengths: tokens of each prompt, by index.
        sizing: says what prompts are aligned to, and rows padded to.
        total: tokens that the rows are sized for; 0: those of all prompts. Equal totals give rows of equal lengths.
    """
    by_length: dict[int, deque[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(sizing.aligned(length), deque()).append(index)
    aligned_lengths = sorted(by_length, reverse=True)
    total = total or sum(map(sizing.aligned, lengths))
    while aligned_lengths:
        free = max(sizing.capacity(total), sizing.row_length(aligned_lengths[0]))
        row, total = PackedRow(), total - free
        while fitting := [length for length in aligned_lengths if length <= free]:
            longest = fitting[0]
            row.prompts.append(by_length[longest].popleft())
            row.begins.append(row.length)
            row.length += longest
            free -= longest
            if not by_length[longest]:
                aligned_lengths.remove(longest)
        yield row


def pack_batch(
    rows: Sequence[Sequence[tuple[Any, int]]],
    length: int,
    tokens_of: Callable[[Any], np.ndarray],
    slot_of: Callable[[Any], int] = lambda prompt: -1,
) -> PackedBatch:
    """Returns prompts written into rows of `length` tokens.

    Args:
        rows: for each row its prompts, and where in the row each begins.
        length: T.
        tokens_of: returns a prompt's tokens, [t] int32.
        slot_of: returns a prompt's slot; -1: none.
    """
    tokens = empty_rows(len(rows), length)
    for row, prompts in zip(tokens, rows):
        for segment, (prompt, begin) in enumerate(prompts, start=1):
            fill(row, begin, segment, tokens_of(prompt), slot_of(prompt))
    return PackedBatch(tuple(map(tuple, rows)), tokens)


def fill(row: np.ndarray, begin: int, segment: int, tokens: np.ndarray, slot: int = -1) -> None:
    """Writes a prompt into a row, in place.

    Args:
        row: [T, 4] int32.
        begin: where in the row the prompt begins.
        segment: its segment, from 1.
        tokens: [t] int32.
        slot: its slot; -1: none.
    """
    part = row[begin : begin + len(tokens)]
    part[:, TOKEN] = tokens
    part[:, POSITION] = np.arange(len(tokens))
    part[:, SEGMENT] = segment
    part[:, SLOT] = slot


def empty_rows(rows: int, length: int) -> np.ndarray:
    """Returns rows of padding, [rows, length, 4] int32."""
    packed = np.zeros((rows, length, COLUMNS), np.int32)
    packed[:, :, (POSITION, SLOT)] = -1
    return packed
