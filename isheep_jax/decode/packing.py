"""Several prompts in one row of tokens: which go together, and how a row is written down."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

# Tokens of a row that is filled with several prompts. So many keep the arithmetic units of any device busy, and few
# enough keep each prompt's share of the row's attention small.
ROW = 512

# Columns of a row [T, 4] (int32).
TOKEN = 0
AT = 1  # place in its prompt, behind a shared prefix; -1: padding
SEGMENT = 2  # which prompt of the row, from 1; 0: padding
SLOT = 3  # row of the cache that the token's keys and values go to; -1: none
COLUMNS = 4


@dataclass
class Row:
    """Prompts (by index) and where in the row each begins."""

    used: int = 0
    prompts: list[int] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)


def pack(lengths: Sequence[int], align: int) -> Iterator[Row]:
    """Rows of at most `ROW` tokens, or of one longer prompt; rows with the longest prompts first.

    lengths: of prompts, by index. align: prompts begin at multiples of it. A row takes the longest prompt that is left,
    and then whatever is the longest that still fits.
    """
    by_room: dict[int, deque[int]] = {}
    for index, length in enumerate(lengths):
        by_room.setdefault(-(-length // align) * align, deque()).append(index)
    rooms = sorted(by_room, reverse=True)
    while rooms:
        row, free = Row(), max(ROW, rooms[0])
        while fits := [room for room in rooms if room <= free]:
            row.prompts.append(by_room[fits[0]].popleft())
            row.begins.append(row.used)
            row.used += fits[0]
            free -= fits[0]
            if not by_room[fits[0]]:
                rooms.remove(fits[0])
        yield row


def fill(row: np.ndarray, begin: int, segment: int, tokens: np.ndarray, slot: int = -1) -> None:
    """Writes a prompt into a row [T, 4]."""
    part = row[begin : begin + len(tokens)]
    part[:, TOKEN] = tokens
    part[:, AT] = np.arange(len(tokens))
    part[:, SEGMENT] = segment
    part[:, SLOT] = slot


def empty_rows(rows: int, length: int) -> np.ndarray:
    """[rows, length, 4] of padding."""
    packed = np.zeros((rows, length, COLUMNS), np.int32)
    packed[:, :, (AT, SLOT)] = -1
    return packed
