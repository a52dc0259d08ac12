"""What int8 weights and an int8 cache change in a model's predictions, measured on its own completions."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import alignment, allocate, bucket_of, constrain_rows, data_shards, decode_setup
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.packing import empty_rows, fill
from isheep_jax.decode.programs import prefill
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.decode.tokenization import TokenizedPrompt
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import CacheWrite, KVCache
from isheep_jax.model.transformer import forward, logits
from isheep_jax.text.conversation import Prompt
from isheep_jax.text.tokenizer import Tokenizer

# Sequences that are compared at the same time, and positions of each whose logits exist at a time.
_ROWS = 8
_POSITIONS = 32


@dataclass(frozen=True)
class Quality:
    """Predictions of the next token as the settings have it, against those of plain weights and a plain cache.

    tokens: how many predictions were compared. divergence: mean of the Kullback-Leibler divergence KL(plain || set)
    (nats per token). loss: mean of log p(token) under the plain model, less that under the other (nats per token); as
    the plain model drew the tokens, its expectation is the divergence. agreement: share (0 to 1) whose most probable
    token is the same.
    """

    tokens: int
    divergence: float
    loss: float
    agreement: float


def measure_quality(
    params: dict,
    architecture: Architecture,
    tokenizer: Tokenizer,
    config: DecodeConfig,
    prompts: Sequence[Prompt],
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    compute_dtype: str | jnp.dtype = "bfloat16",
    max_tokens: int = 128,
) -> Quality:
    """Lets the plain model complete the prompts at temperature 1, and compares what both predict along the way.

    params: not quantized, as of `Engine`. config: weights and cache are compared with "model" for both. max_tokens:
    new tokens of a completion. The comparison prefills prompts as the engine does and reads the completions through the
    cache, so every prediction is that of a decode step with the same past. Both sets of weights are in memory at the
    same time. Raises `UserError` when no prompt fits or no completion has a token.
    """
    plain, other = (
        Engine(params, architecture, tokenizer, settings, mesh=mesh, seed=seed, compute_dtype=compute_dtype)
        for settings in (dataclasses.replace(config, weights_dtype="model", kv_cache_dtype="model"), config)
    )
    requests = {str(i): Request(str(i), prompt) for i, prompt in enumerate(prompts)}
    completions = plain.generate(list(requests.values()), SamplingParams(temperature=1.0, max_tokens=max_tokens))
    texts = [(plain.tokenize(requests[c.id]), c.tokens) for c in completions if c.tokens]
    if not texts:
        raise UserError(f"no completion of the {len(prompts)} prompts has a token to compare: do the prompts fit?")
    texts.sort(key=lambda text: text[0].id)
    shards = data_shards(mesh)
    rows = -(-_ROWS // shards) * shards
    length = bucket_of(max(len(prompt.own) for prompt, _ in texts), alignment(mesh))
    steps = bucket_of(max(len(tokens) for _, tokens in texts), _POSITIONS)
    found = [
        _compare_some(plain, other, texts[start : start + rows], rows, length, steps)
        for start in range(0, len(texts), rows)
    ]
    each = np.concatenate(found).astype(np.float64)
    divergence, loss, agreement = each.mean(axis=0).tolist()
    return Quality(len(each), divergence, loss, agreement)


def _compare_some(
    plain: Engine,
    other: Engine,
    texts: list[tuple[TokenizedPrompt, tuple[int, ...]]],
    rows: int,
    length: int,
    steps: int,
) -> np.ndarray:
    """Of each new token [tokens, 3]: divergence, loss, agreement. length, steps: slots for prompts and new tokens."""
    packed = empty_rows(rows, length)
    inputs, targets = np.zeros((2, rows, steps), np.int32)
    at = np.full((rows, steps), -1, np.int32)
    for row, (prompt, tokens) in enumerate(texts):
        count = len(tokens)
        fill(packed[row], 0, 1, prompt.own, row)
        # As a decode step: the last token of the prompt comes once more, and gives the first new one.
        inputs[row, :count] = [prompt.own[-1], *tokens[:-1]]
        targets[row, :count] = tokens
        at[row, :count] = len(prompt.own) - 1 + np.arange(count)
    caches = []
    for engine in (plain, other):
        cache = allocate(engine.architecture, rows, length + steps, engine.chunk_shape.cache_dtype, engine.mesh)
        caches.append(prefill(engine.params, cache, packed, None, **engine.static))
    found = _compare((plain.params, other.params), tuple(caches), inputs, at, targets, **plain.static)
    return np.asarray(found)[at >= 0]


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def _compare(
    params: tuple[dict, dict],
    caches: tuple[KVCache, KVCache],
    inputs: np.ndarray,
    at: np.ndarray,
    targets: np.ndarray,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """[R, C, 3] float32: divergence, loss and agreement of two models after each of the tokens `inputs` [R, C].

    caches: of each model, with the prompts. at: [R, C], slots of the inputs, -1 for padding. targets: [R, C].
    """
    inputs, at, targets = (constrain_rows(x, mesh) for x in (inputs, at, targets))

    def hidden(params, cache):
        return forward(
            params,
            architecture,
            inputs,
            jnp.maximum(at, 0),
            decode_setup(mesh, compute_dtype),
            cache=CacheWrite(cache, at),
        )[0]

    def some(piece):
        *both, targets = piece
        p, q = (jax.nn.log_softmax(logits(w, architecture, h, compute_dtype)) for w, h in zip(params, both))
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        loss = jnp.take_along_axis(p - q, targets[..., None], axis=-1)[..., 0]
        return jnp.stack([divergence, loss, p.argmax(axis=-1) == q.argmax(axis=-1)], axis=-1)

    R, C = inputs.shape
    whole = (*map(hidden, params, caches), targets)
    pieces = tuple(x.reshape(R, C // _POSITIONS, _POSITIONS, *x.shape[2:]).swapaxes(0, 1) for x in whole)
    return jax.lax.map(some, pieces).swapaxes(0, 1).reshape(R, C, 3)
