"""Finds tokens whose rows of the embeddings were never trained: base models have turn markers in name only.

Adapters leave the embeddings as they are. Where the markers of a chat template are all alike in them, or next to
nothing, a model that is fine-tuned with LoRA cannot tell a header from the end of a turn, and never stops.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from isheep_jax.checkpoint.hf_weights import Tensor
from isheep_jax.model.architecture import Architecture

# Rows over the whole table that tell how long a trained one is; other control tokens that markers are compared with.
_SAMPLE, _OTHERS = 16, 32
# A row of less than this share of a trained row's length is next to nothing; two rows that differ by less are alike.
# Unused rows of Gemma 3 270M differ by 0.01, its turn markers by 0.3 (measured).
_NOTHING, _ALIKE = 0.01, 0.05


def untrained(
    tensors: Mapping[str, Tensor], architecture: Architecture, markers: Sequence[int], others: Sequence[int]
) -> list[int]:
    """Returns the markers whose rows are near zero or alike, in the embeddings or in the lm_head.

    Args:
        tensors: of a checkpoint, by name; a few rows of two of them are read.
        architecture: the model's.
        markers: ids of tokens.
        others: ids of more control tokens. A marker like several of these, such as reserved ones, was never used.
    """
    tables = ["model.embed_tokens.weight", *(() if architecture.tied_embeddings else ("lm_head.weight",))]
    found = set().union(*(_untrained(tensors[name], markers, others[:_OTHERS]) for name in tables))
    return [i for i in markers if i in found]


def _untrained(tensor: Tensor, markers: Sequence[int], others: Sequence[int]) -> set[int]:
    sample = np.linspace(0, tensor.shape[0] - 1, _SAMPLE, dtype=int)
    usual = np.median(np.linalg.norm(_rows(tensor, sample), axis=-1))
    rows = _rows(tensor, markers)
    lengths = np.linalg.norm(rows, axis=-1)

    def alike(these: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(rows[:, None] - these[None], axis=-1)
        return (distances <= _ALIKE * lengths[:, None]).sum(axis=1)

    # A marker is like itself. One other token may be a copy of it: padding is often made so.
    never = (alike(rows) > 1) | (alike(_rows(tensor, others)) > 1) | (lengths <= _NOTHING * usual)
    return {i for i, is_untrained in zip(markers, never) if is_untrained}


def _rows(tensor: Tensor, ids: Sequence[int]) -> np.ndarray:
    rows = np.empty((len(ids), *tensor.shape[1:]), tensor.dtype)
    for row, i in zip(rows, ids):
        tensor.read_rows(int(i), int(i) + 1, row[None])
    return rows.astype(np.float64)
