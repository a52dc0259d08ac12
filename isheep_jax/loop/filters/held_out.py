"""Keeps the texts of evaluation tasks out of a run: no instruction that it writes and no seed task may repeat one."""

from collections.abc import Set

from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.records import user_text


def is_held_out(instruction: str, input: str, held_out: Set[str]) -> bool:
    """Returns whether an instruction, alone or with its input, is one of the texts, which are normalized."""
    return normalize(instruction) in held_out or normalize(user_text(instruction, input)) in held_out
