"""Log-probabilities of given continuations ("choices") of prompts, by prefill alone.

A batch of prompts is prefilled once. Its last hidden states give the first token of every choice; where choices have
more tokens, each continues from the prompt's KV cache in turn and overwrites what the choice before it left there.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import bucket_of, constrain_cache, constrain_rows, decode_activations, replicate
from isheep_jax.decode.requests import ChoiceScores, Request
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.tokenizer import Tokenizer
from isheep_jax.model.transformer import forward, logits


@dataclass
class _Item:
    """A tokenised request. bucket: padded lengths of the prompt and of the longest choice."""

    id: str
    prompt: list[int]
    choices: list[list[int]]
    bucket: tuple[int, int]


def score_choices(
    params: dict,
    architecture: Architecture,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    choices: Sequence[str],
    *,
    context: int,
    rows: int,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> Iterator[ChoiceScores]:
    """Sums of log p(token) over each choice's tokens after each prompt, batch by batch, longest first.

    A choice is tokenised together with its prompt (`Tokenizer.encode_choice`). A prompt that does not fit `context`
    with a choice, or that a choice changes the tokens of, is an error of that request alone. rows: prompts per batch.
    """
    groups: dict[tuple[int, int], list[_Item]] = {}
    for request in requests:
        prompt = tokenizer.encode_prompt(request.prompt)
        try:
            item = _tokenize(tokenizer, request, prompt, choices, context)
        except UserError as error:
            yield ChoiceScores(request.id, error=str(error))
        else:
            groups.setdefault(item.bucket, []).append(item)
    for bucket in sorted(groups, reverse=True):
        items = sorted(groups[bucket], key=lambda item: (-len(item.prompt), item.id))
        for start in range(0, len(items), rows):
            batch = items[start : start + rows]
            scores = _score(
                params,
                *_pack(batch, rows),
                architecture=architecture,
                mesh=mesh,
                compute_dtype=compute_dtype,
            )
            for item, row in zip(batch, np.asarray(scores).tolist()):
                yield ChoiceScores(item.id, tuple(row))


def _tokenize(tokenizer: Tokenizer, request: Request, prompt: list[int], choices: Sequence[str], context: int) -> _Item:
    if not prompt:
        raise UserError("the prompt is empty")
    encoded = [tokenizer.encode_choice(request.prompt, choice) for choice in choices]
    longest = max((len(tokens) for tokens in encoded), default=1)
    if len(prompt) + longest > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and its longest choice {longest}; "
            f"decode.context={context} must hold both"
        )
    # The padded lengths are this request's own, so that its score does not depend on what is scored beside it.
    padded = 1 << max(longest - 1, 0).bit_length()
    return _Item(request.id, prompt, encoded, (bucket_of(len(prompt), context), padded))


def _pack(batch: list[_Item], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [R, T + 1] with their lengths in the last column, and choices [R, C, L + 1] likewise.

    The first item is repeated to fill the fixed shape.
    """
    bucket, longest = batch[0].bucket
    prompts = np.zeros((rows, bucket + 1), np.int32)
    choices = np.zeros((rows, len(batch[0].choices), longest + 1), np.int32)
    for row, item in enumerate(batch):
        prompts[row, : len(item.prompt)] = item.prompt
        prompts[row, -1] = len(item.prompt)
        for index, tokens in enumerate(item.choices):
            choices[row, index, : len(tokens)] = tokens
            choices[row, index, -1] = len(tokens)
    prompts[len(batch) :] = prompts[0]
    choices[len(batch) :] = choices[0]
    return prompts, choices


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def _score(
    params: dict,
    prompts: np.ndarray,
    choices: np.ndarray,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Scores [R, C] float32 of packed prompts and choices (see `_pack`)."""
    prompts, choices = constrain_rows(prompts, mesh), constrain_rows(choices, mesh)
    tokens, lengths = prompts[:, :-1], prompts[:, -1]
    choices, counts = choices[..., :-1], choices[..., -1]
    bucket, longest = tokens.shape[1], choices.shape[-1]
    run = functools.partial(
        forward, params, architecture, compute_dtype=compute_dtype, activations=decode_activations(mesh)
    )

    def logprob(hidden, targets):  # [R, D], [R, C] -> [R, C], of hidden positions already gathered
        scores = jax.nn.log_softmax(logits(params, architecture, hidden, compute_dtype).astype(jnp.float32))
        return jnp.take_along_axis(scores, targets, axis=-1)

    positions = jnp.broadcast_to(jnp.arange(bucket, dtype=jnp.int32), tokens.shape)
    hidden, cache = run(tokens, positions, collect=longest > 1)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    total = jnp.where(counts > 0, logprob(last, choices[..., 0]), 0.0)
    if longest == 1:
        return replicate(total, mesh)

    # Slots behind the prompts for the rest of a choice; what padding left in others is overwritten before it is seen.
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, longest - 1), (0, 0))), cache)
    step = jnp.arange(longest - 1, dtype=jnp.int32)

    def continue_with(cache, choice):
        ids, count = choice  # [R, L], [R]
        # The token at `step` predicts the one after it, and the last token predicts nothing.
        valid = step < count[:, None] - 1
        hidden, cache = run(ids[:, :-1], jnp.where(valid, lengths[:, None] + step, -1), cache=cache)
        # One position at a time: [R, V] logits and never [R, L, V].
        each = jax.lax.map(
            lambda pair: logprob(pair[0], pair[1][:, None])[:, 0],
            (hidden.swapaxes(0, 1), ids[:, 1:].swapaxes(0, 1)),
        )
        return constrain_cache(cache, mesh), jnp.sum(jnp.where(valid, each.T, 0.0), axis=1)

    _, rest = jax.lax.scan(continue_with, cache, (choices.swapaxes(0, 1), counts.T))
    return replicate(total + rest.T, mesh)
