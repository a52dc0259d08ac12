"""Rows of tensors that stay in the host's memory, for weights that are loaded again and again in several layouts."""

from collections.abc import Callable, Hashable, Mapping

import numpy as np

Rows = Mapping[tuple[int, int], np.ndarray]


class KeptRows:
    """What was read of tensors, by what and which rows, as long as it fits.

    A process keeps its own devices' share. Two layouts that split the rows differently are kept both.
    """

    def __init__(self, limit: int):
        """limit: bytes."""
        self._left = limit
        self._rows: dict[Hashable, Rows] = {}

    def rows(self, what: Hashable, read: Callable[[], Rows]) -> Rows:
        """Returns rows that are kept, or those that `read` returns, by extent. They must not be changed."""
        if what in self._rows:
            return self._rows[what]
        rows = read()
        size = sum(part.nbytes for part in rows.values())
        if size <= self._left:
            self._left -= size
            self._rows[what] = rows
        return rows
