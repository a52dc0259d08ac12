"""A minute random model and a tokenizer made of a table, shared by the decode tests."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from architectures import small
from jax.sharding import Mesh
from meshes import mesh_of

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Request
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import init_parameters
from isheep_jax.model.transformer import ForwardSetup, forward, logits

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ARCHITECTURE = small(context_length=128, tied_embeddings=False)


class TableTokenizer:
    """Token i is the i-th piece; text is encoded by the longest piece that matches.

    Begins every prompt with token 0 (beginning of text). Token 1 ends a turn. Both are special and decode to nothing,
    and so are `specials`, texts by token.
    """

    def __init__(self, specials: Mapping[int, str] | None = None):
        self.specials = specials or {}
        letters = "abcdefghijklmnopqrstuvwxyz0123456789 .|"
        pairs = ["ab", "bc", "ca", "de", "ed", "||", "10", "st", "op", "xy", "yz", "zx", " a", " b", " c", " d"]
        pieces = ["", "", *letters, *pairs]
        self.pieces = pieces + [f"<{i}>" for i in range(len(pieces), ARCHITECTURE.vocab_size)]
        self.pieces = ["" if i in self.specials else piece for i, piece in enumerate(self.pieces)]
        self.bos_id, self.eos_ids, self.pad_id = 0, (1,), 1
        self.vocab_size = ARCHITECTURE.vocab_size

    def encode(self, text: str, bos: bool = True) -> list[int]:
        tokens = [self.bos_id] if bos else []
        while text:
            longest = max((piece for piece in self.pieces if piece and text.startswith(piece)), key=len)
            tokens.append(self.pieces.index(longest))
            text = text[len(longest) :]
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def special_id(self, text: str) -> int | None:
        return next((token for token, special in self.specials.items() if special == text), None)

    def missing_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        return ()

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.encode(prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.encode_prompt(prompt) for prompt in prompts]

    def align_continuation(
        self, prompt: str, text: str, ids: Sequence[int] | None = None
    ) -> tuple[list[int], list[tuple[int, int]], int]:
        (ids,) = self.encode_choices(prompt, [text])
        ends = list(itertools.accumulate(len(self.pieces[i]) for i in ids))
        return ids, list(zip([0, *ends], ends)), self.eos_ids[0]

    def encode_choices(self, prompt: str, choices: Sequence[str], ids: Sequence[int] | None = None) -> list[list[int]]:
        alone, tokenized = self.encode(prompt), []
        for choice in choices:
            together = self.encode(prompt + choice)
            if together[: len(alone)] != alone:
                raise UserError(f"the prompt's tokens change when {choice!r} follows")
            tokenized.append(together[len(alone) :])
        return tokenized


@jax.jit
def random_parameters(seed: int) -> dict:
    """Weights large enough that the next token depends on the whole context and varies."""
    params = init_parameters(ARCHITECTURE, jax.random.key(seed), jnp.float32)
    return jax.tree.map(lambda leaf: leaf * jnp.where(leaf.std() > 0, 0.4 / leaf.std(), 1.0), params)


def make_engine(
    params: dict,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    tokenizer: TableTokenizer | None = None,
    **settings,
) -> Engine:
    """An engine with few slots; mesh None: on one device."""
    config = DecodeConfig(**{"slots": 4, "steps_per_call": 5, "max_length": 48, **settings})
    tokenizer = tokenizer or TableTokenizer()
    mesh = mesh or mesh_of()
    return Engine(params, ARCHITECTURE, tokenizer, config, mesh=mesh, seed=seed, compute_dtype="float32")


def ragged(count: int) -> list[Request]:
    """Prompts of 1 to 38 letters, of both buckets of a context of 48."""
    draw = np.random.default_rng(5)
    return [Request(f"r{i}", "".join(draw.choice(list(LETTERS), 1 + 37 * i // count))) for i in range(count)]


@jax.jit
def _plain_forward(params, row):
    hidden, _ = forward(params, ARCHITECTURE, row, jnp.arange(row.shape[1])[None], ForwardSetup(jnp.float32))
    return logits(params, ARCHITECTURE, hidden, jnp.float32)


def full_logits(params: dict, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of the plain forward, without a cache."""
    row = np.zeros((1, 128), np.int32)  # the padding to the right is not seen by what comes before it
    row[0, : len(tokens)] = tokens
    return np.asarray(_plain_forward(params, row))[0, : len(tokens)]
