"""Log-probabilities of whole texts as continuations, and embeddings of prompts; both by one prefill of packed rows."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import constrain_rows, replicate, rows_sharding
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import SEGMENT, PackedBatch
from isheep_jax.decode.prefill import Prefix, forward_packed
from isheep_jax.decode.prefill_logprobs import greedy_logprobs, score_packed
from isheep_jax.decode.requests import NOT_NUMBERS, Embedding, Request, TextLogprob, TokenIds
from isheep_jax.decode.tokenization import PromptError, known_tokens, many_prompt_tokens
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.sharding import put


@dataclass(frozen=True, eq=False)
class _Text:
    """A prompt and the text after it.

    prefix: the prompt's tokens that other prompts share.
    tokens: [T] int32, the prompt's other tokens and the targets, without the last one.
    prompt_end: index of the prompt's last token.
    targets: the text's tokens and, if `has_end`, the one that ends it.
    spans: the characters of the text that each of its tokens stands for; empty for token ids.
    """

    id: str
    prefix: tuple[int, ...]
    tokens: np.ndarray
    prompt_end: int
    targets: list[int]
    has_end: bool
    spans: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt to embed. prefix: none. tokens: [T] int32."""

    id: str
    prefix: tuple[int, ...]
    tokens: np.ndarray


def text_logprobs(
    model: LoadedModel, requests: Sequence[Request], texts: Sequence[str | TokenIds]
) -> Iterator[TextLogprob]:
    """Yields the log-probability of one text after each prompt, in the order in which they are computed.

    After a conversation, a text is the response as the chat template writes it. A prompt that does not fit with its
    text, or whose tokens the text changes, is an error of that request. Token ids change no other tokens.
    """
    prepare, dispatch = functools.partial(_prepare, model), functools.partial(_dispatch, model)
    return score_packed(model, list(zip(requests, texts)), prepare, dispatch, _results)


def _prepare(
    model: LoadedModel, pairs: Sequence[tuple[Request, str | TokenIds]]
) -> tuple[list[TextLogprob], list[_Text]]:
    """Returns the results of pairs that cannot be scored, and the texts of the others."""
    failed, items = [], []
    tokenized = many_prompt_tokens(model.tokenizer, [request.prompt for request, _ in pairs])
    for (request, text), tokens in zip(pairs, tokenized):
        try:
            items.append(_tokenize(model, request, tokens, text))
        except UserError as error:
            failed.append(TextLogprob(request.id, error=str(error)))
    return failed, items


def _tokenize(model: LoadedModel, request: Request, tokens: list[int] | UserError, text: str | TokenIds) -> _Text:
    """Returns a prompt with its text. tokens: the prompt's, or why it has none."""
    if isinstance(tokens, UserError):
        raise tokens
    if isinstance(text, TokenIds):
        targets, spans, end = known_tokens(model.tokenizer, text), [], None
    elif isinstance(request.prompt, TokenIds):
        raise PromptError("what follows token ids must be token ids")
    else:
        targets, spans, end = model.tokenizer.align_continuation(request.prompt, text, tokens)
    prompt = model.tokenize(request, spare=len(targets), continuation="its text", tokens=tokens)
    has_end = end is not None
    targets = [*targets, end] if has_end else targets
    tokens = np.concatenate([prompt.suffix, np.asarray(targets[:-1], np.int32)])
    return _Text(request.id, prompt.prefix, tokens, len(prompt.suffix) - 1, targets, has_end, spans)


def _dispatch(model: LoadedModel, batch: PackedBatch, prefix: Prefix | None) -> tuple[jax.Array, jax.Array]:
    """Returns two arrays [R, U] about the tokens of a row's texts, one text after the other, as `token_logprobs`."""
    targets = [[token for item, _ in row for token in item.targets] for row in batch.rows]
    indices = [
        [begin + item.prompt_end + i for item, begin in row for i in range(len(item.targets))] for row in batch.rows
    ]
    width = model.sizing.targets_of_row(batch.tokens.shape[1], max(map(len, targets)))
    padded_indices, padded_targets = np.zeros((2, len(batch.rows), width), np.int32)
    for r, (row_indices, row_targets) in enumerate(zip(indices, targets)):
        padded_indices[r, : len(row_indices)] = row_indices
        padded_targets[r, : len(row_targets)] = row_targets
    arrays = put((batch.tokens, padded_indices, padded_targets), rows_sharding(model.mesh))
    return token_logprobs(model.params, *arrays, prefix, **model.static_args)


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def token_logprobs(
    params: dict,
    packed: jax.Array,
    indices: jax.Array,
    targets: jax.Array,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities [R, U] (float32) of next tokens, and whether each is the most probable one (bool).

    Args:
        params: weights.
        packed: [R, T, 4] int32, see `packing`.
        indices: [R, U] int32, tokens of the row; U is a power of two.
        targets: [R, U] int32, the token id that follows each of them.
        prefix: tokens that all the prompts follow.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
    """
    packed, indices, targets = (constrain_rows(x, mesh) for x in (packed, indices, targets))
    hidden, _ = forward_packed(
        params, packed, prefix, architecture=architecture, mesh=mesh, compute_dtype=compute_dtype
    )
    hidden = jnp.take_along_axis(hidden, indices[..., None], axis=1)  # [R, U, D]
    scores = greedy_logprobs(params, architecture, hidden, targets[..., None], compute_dtype)
    return jax.tree.map(lambda x: replicate(x[..., 0], mesh), scores)


def _results(batch: PackedBatch, scores: tuple[jax.Array, jax.Array]) -> Iterator[TextLogprob]:
    logprobs, greedy = jax.device_get(scores)
    logprobs = np.asarray(logprobs, np.float64)
    for row, values, is_most_probable in zip(batch.rows, logprobs, greedy):
        begin = 0
        for item, _ in row:
            after = begin + len(item.targets)
            end = after - item.has_end
            own = values[begin:end]
            yield TextLogprob(
                item.id,
                float(own.sum()),
                end - begin,
                greedy=bool(is_most_probable[begin:end].all()),
                logprobs=tuple(own.tolist()),
                end=float(values[end]) if item.has_end else None,
                spans=tuple(item.spans),
            )
            begin = after


def embed(model: LoadedModel, requests: Sequence[Request]) -> Iterator[Embedding]:
    """Yields the mean of the last hidden states over each prompt, in the order in which they are computed."""
    prepare, dispatch = functools.partial(_prepare_embed, model), functools.partial(_dispatch_embed, model)
    return score_packed(model, requests, prepare, dispatch, _read_embed)


def _prepare_embed(model: LoadedModel, requests: Sequence[Request]) -> tuple[list[Embedding], list[_Prompt]]:
    """Returns the results of prompts that cannot be embedded, and the others."""
    failed, prompts = [], []
    tokenized = many_prompt_tokens(model.tokenizer, [request.prompt for request in requests])
    for request, tokens in zip(requests, tokenized):
        try:
            if isinstance(tokens, UserError):
                raise tokens
            # Without a prefix, whose hidden states a shared prefill does not keep.
            prompt = model.tokenize(Request(request.id, request.prompt), spare=0, tokens=tokens)
            prompts.append(_Prompt(request.id, (), prompt.suffix))
        except UserError as error:
            failed.append(Embedding(request.id, error=str(error)))
    return failed, prompts


def _dispatch_embed(model: LoadedModel, batch: PackedBatch, prefix: None) -> jax.Array:
    segments = model.sizing.prompts_of_row(batch.tokens.shape[1], max(map(len, batch.rows)))
    packed = put(batch.tokens, rows_sharding(model.mesh))
    return segment_means(model.params, packed, segments=segments, **model.static_args)


def _read_embed(batch: PackedBatch, means: jax.Array) -> Iterator[Embedding]:
    for row, vectors in zip(batch.rows, jax.device_get(means)):
        for (item, _), vector in zip(row, vectors):
            if np.isfinite(vector).all():
                yield Embedding(item.id, tuple(vector.tolist()))
            else:
                yield Embedding(item.id, error=NOT_NUMBERS)


@functools.partial(jax.jit, static_argnames=("segments", "architecture", "mesh", "compute_dtype"))
def segment_means(
    params: dict,
    packed: jax.Array,
    *,
    segments: int,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Returns means [R, segments, D] (float32) of the last hidden states over the segments of packed rows.

    Args:
        params: weights.
        packed: [R, T, 4] int32, see `packing`.
        segments: most segments of a row.
        architecture: the model's.
        mesh: the decode mesh.
        compute_dtype: of activations.
    """
    packed = constrain_rows(packed, mesh)
    hidden, _ = forward_packed(params, packed, None, architecture=architecture, mesh=mesh, compute_dtype=compute_dtype)
    in_segment = packed[:, None, :, SEGMENT] == 1 + jnp.arange(segments)[:, None]
    in_segment = in_segment.astype(jnp.float32)  # [R, segments, T]
    total = jnp.einsum("rst,rtd->rsd", in_segment, hidden.astype(jnp.float32))
    return replicate(total / jnp.maximum(in_segment.sum(axis=-1, keepdims=True), 1.0), mesh)
