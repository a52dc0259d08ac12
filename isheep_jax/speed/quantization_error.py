"""What int8 weights and an int8 KV cache change in a model's predictions, measured on its own completions."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.cache import (
    Sizing,
    allocate_cache,
    bucket_of,
    constrain_rows,
    data_shards,
    decode_setup,
    rows_sharding,
)
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import empty_rows, fill
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.decode.tokenization import TokenizedPrompt
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import CacheWrite, KVCache
from isheep_jax.model.transformer import forward, logits
from isheep_jax.sharding import put
from isheep_jax.text.conversation import Prompt
from isheep_jax.text.tokenizer import Tokenizer

# Sequences that are compared at the same time, and positions of each whose logits exist at the same time.
_ROWS = 8
_POSITIONS = 32


@dataclass(frozen=True)
class QuantizationError:
    """Predictions of the next token with the settings' dtypes, against those with the model's own dtype.

    tokens: how many predictions were compared.
    divergence: mean Kullback-Leibler divergence KL(model || int8), nats per token.
    loss: mean of log p(token) under the model, less that under int8, nats per token; as the model itself sampled the
      tokens, its expectation is the divergence.
    agreement: share (0 to 1) of predictions whose most probable token is the same.
    """

    tokens: int
    divergence: float
    loss: float
    agreement: float


def measure_quantization_error(
    params: Any,
    architecture: Architecture,
    tokenizer: Tokenizer,
    config: DecodeConfig,
    prompts: Sequence[Prompt],
    *,
    mesh: Mesh,
    seed: int = 0,
    compute_dtype: str | jnp.dtype = "bfloat16",
    max_tokens: int = 128,
) -> QuantizationError:
    """Lets the plain model complete the prompts at temperature 1, and compares both predictions along the way.

    The comparison prefills prompts as the engine does and reads the completions through the cache, so every prediction
    is that of a decode step with the same past. Both sets of weights are in memory at the same time.

    Args:
      params: as for `Engine`, not quantized.
      architecture: the model's sizes.
      tokenizer: the model's tokenizer.
      config: its weights_dtype and kv_cache_dtype are compared with "model" for both.
      prompts: texts or conversations to complete.
      mesh: the decode mesh.
      seed: seeds the completions.
      compute_dtype: the model's own dtype.
      max_tokens: new tokens of each completion.

    Raises `UserError` when no prompt fits or no completion has a token.
    """
    plain, quantized = (
        Engine(params, architecture, tokenizer, settings, mesh=mesh, seed=seed, compute_dtype=compute_dtype)
        for settings in (dataclasses.replace(config, weights_dtype="model", kv_cache_dtype="model"), config)
    )
    requests = {str(i): Request(str(i), prompt) for i, prompt in enumerate(prompts)}
    completions = plain.generate(list(requests.values()), SamplingParams(temperature=1.0, max_tokens=max_tokens))
    texts = [(plain.model.tokenize(requests[c.id]), c.tokens) for c in completions if c.tokens]
    if not texts:
        raise UserError(f"no completion of the {len(prompts)} prompts has a token to compare: do the prompts fit?")
    texts.sort(key=lambda text: text[0].id)
    shards = data_shards(mesh)
    rows = -(-_ROWS // shards) * shards
    length = Sizing.of(mesh).row_length(max(len(prompt.suffix) for prompt, _ in texts))
    steps = bucket_of(max(len(tokens) for _, tokens in texts), _POSITIONS)
    parts = [
        _compare_batch(plain.model, quantized.model, texts[start : start + rows], rows, length, steps)
        for start in range(0, len(texts), rows)
    ]
    comparisons = np.concatenate(parts).astype(np.float64)
    divergence, loss, agreement = comparisons.mean(axis=0).tolist()
    return QuantizationError(len(comparisons), divergence, loss, agreement)


def _compare_batch(
    plain: LoadedModel,
    quantized: LoadedModel,
    texts: list[tuple[TokenizedPrompt, tuple[int, ...]]],
    rows: int,
    length: int,
    steps: int,
) -> np.ndarray:
    """Returns divergence, loss and agreement [tokens, 3] of each new token.

    Args:
      plain: the model in its own dtype.
      quantized: the model with the settings' dtypes.
      texts: prompts and their new tokens, at most `rows`.
      rows: rows of the batch, R.
      length: cache positions for a prompt.
      steps: cache positions for new tokens.
    """
    packed = empty_rows(rows, length)
    inputs, targets = np.zeros((2, rows, steps), np.int32)
    positions = np.full((rows, steps), -1, np.int32)
    for row, (prompt, tokens) in enumerate(texts):
        count = len(tokens)
        fill(packed[row], 0, 1, prompt.suffix, row)
        # As in a decode step, the last token of the prompt is computed again and gives the first new one.
        inputs[row, :count] = [prompt.suffix[-1], *tokens[:-1]]
        targets[row, :count] = tokens
        positions[row, :count] = len(prompt.suffix) - 1 + np.arange(count)
    arrays = put((packed, inputs, positions, targets), rows_sharding(plain.mesh))
    caches = []
    for model in (plain, quantized):
        cache = allocate_cache(model.architecture, rows, length + steps, model.nominal_shape.cache_dtype, model.mesh)
        caches.append(prefill(model.params, cache, arrays[0], None, **model.static_args))
    comparisons = _compare((plain.params, quantized.params), tuple(caches), *arrays[1:], **plain.static_args)
    return np.asarray(comparisons)[positions >= 0]


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def _compare(
    params: tuple[dict, dict],
    caches: tuple[KVCache, KVCache],
    inputs: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Returns divergence, loss and agreement [R, T, 3] (float32) of two models' predictions after each input token.

    Args:
      params: weights of both models.
      caches: both models' KV caches, with the prompts.
      inputs: [R, T] int32, tokens.
      positions: [R, T] int32, their cache positions; -1: padding.
      targets: [R, T] int32, the tokens that follow.
    """
    inputs, positions, targets = (constrain_rows(x, mesh) for x in (inputs, positions, targets))

    def hidden_states(params, cache):
        return forward(
            params,
            architecture,
            inputs,
            jnp.maximum(positions, 0),
            decode_setup(mesh, compute_dtype),
            cache=CacheWrite(cache, positions),
        )[0]

    def compare_piece(piece):
        *hidden, targets = piece
        p, q = (jax.nn.log_softmax(logits(w, architecture, h, compute_dtype)) for w, h in zip(params, hidden))
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        loss = jnp.take_along_axis(p - q, targets[..., None], axis=-1)[..., 0]
        return jnp.stack([divergence, loss, p.argmax(axis=-1) == q.argmax(axis=-1)], axis=-1)

    R, T = inputs.shape
    whole = (*map(hidden_states, params, caches), targets)
    pieces = tuple(x.reshape(R, T // _POSITIONS, _POSITIONS, *x.shape[2:]).swapaxes(0, 1) for x in whole)
    return jax.lax.map(compare_piece, pieces).swapaxes(0, 1).reshape(R, T, 3)
