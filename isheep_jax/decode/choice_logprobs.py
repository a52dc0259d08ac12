"""Log-probabilities of each of several choices after prompts, by prefill in two passes.

The first pass prefills packed prompts: the hidden state of a prompt's last token gives the first token of every choice.
Choices of more tokens take a second pass over these tokens, which attend to the keys and values of their prompt.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import Sizing, constrain_rows, decode_setup, power_of_two, replicate, rows_sharding
from isheep_jax.decode.loaded import LoadedModel
from isheep_jax.decode.packing import POSITION, SEGMENT, PackedBatch
from isheep_jax.decode.prefill import Prefix, prefix_kv, prefix_length
from isheep_jax.decode.prefill_logprobs import (
    packed_logprobs,
    score_packed,
    target_logprobs,
)
from isheep_jax.decode.requests import ChoiceLogprobs, Request, TokenIds
from isheep_jax.decode.tokenization import PromptError, many_prompt_tokens
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache, PrefixKV
from isheep_jax.model.transformer import forward
from isheep_jax.sharding import put

# Most choices of one call: a segment id of the second pass is the prompt's segment times this, plus the choice.
MAX_CHOICES = 1024
# Most tokens of a row in one second pass; more take several passes.
SECOND_PASS_TOKENS = 512

# Columns of the second pass's tokens [R, W, 5] (int32).
_TOKEN = 0  # token id
_POSITION = 1  # position after the shared prefix
_PROMPT = 2  # segment of the choice's prompt in the packed row; -1: padding
_CHOICE = 3  # which choice of that prompt
_TARGET = 4  # the token that follows
COLUMNS = 5


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt and its choices.

    prefix: the prompt's tokens that other prompts share.
    tokens: [T] int32, its other tokens.
    choices: tokens of each choice.
    """

    id: str
    prefix: tuple[int, ...]
    tokens: np.ndarray
    choices: list[list[int]]


@dataclass(frozen=True)
class _LongChoice:
    """A choice of several tokens, as the second pass sees it.

    segment: its prompt's segment in the packed row.
    choice: index of the choice.
    tokens: all its tokens.
    position: of its first token, after the shared prefix.
    """

    segment: int
    choice: int
    tokens: list[int]
    position: int

    @property
    def scored(self) -> int:
        """How many of its tokens the second pass scores: all but the first."""
        return len(self.tokens) - 1

    @property
    def width(self) -> int:
        """Tokens that the second pass reserves for it: a power of two, so that its sums do not depend on its offset."""
        return power_of_two(self.scored)

    def write(self, columns: np.ndarray) -> None:
        """Writes its tokens into its part [width, 5] of the second pass."""
        count = self.scored
        columns[:count, _TOKEN], columns[:count, _TARGET] = self.tokens[:-1], self.tokens[1:]
        columns[:count, _POSITION] = self.position + np.arange(count)
        columns[:count, _PROMPT] = self.segment
        columns[:count, _CHOICE] = self.choice


# For each row of one second pass, where each long choice begins, and the choice.
_SecondPass = tuple[list[tuple[int, _LongChoice]], ...]


@dataclass(frozen=True)
class _Call:
    """The arrays of one dispatched batch.

    first: [R, U, C], log-probabilities of the first token of choice c after prompt u of row r.
    second: the second passes, each with its log-probabilities [R, W].
    """

    first: jax.Array
    second: list[tuple[_SecondPass, jax.Array]]


def choice_logprobs(
    model: LoadedModel, requests: Sequence[Request], choices: Sequence[str]
) -> Iterator[ChoiceLogprobs]:
    """Yields the log-probabilities of the choices after each prompt, in the order in which they are computed.

    A choice's log-probability is the sum over its tokens, less what belongs to longer choices that begin with them. A
    prompt that does not fit with its longest choice, or whose tokens a choice changes, is an error of that request.
    """
    prepare, dispatch = functools.partial(_prepare, model, choices), functools.partial(_dispatch, model)
    return score_packed(model, requests, prepare, dispatch, _results)


def _prepare(
    model: LoadedModel, choices: Sequence[str], requests: Sequence[Request]
) -> tuple[list[ChoiceLogprobs], list[_Prompt]]:
    """Returns the results of requests that cannot be scored, and the prompts of the others."""
    failed, prompts = [], []
    tokenized = many_prompt_tokens(model.tokenizer, [request.prompt for request in requests])
    for request, tokens in zip(requests, tokenized):
        try:
            prompts.append(_tokenize(model, request, tokens, choices))
        except UserError as error:
            failed.append(ChoiceLogprobs(request.id, error=str(error)))
    return failed, prompts


def _tokenize(model: LoadedModel, request: Request, tokens: list[int] | UserError, choices: Sequence[str]) -> _Prompt:
    """Returns a prompt with its choices. tokens: the prompt's, or why it has none."""
    if isinstance(request.prompt, TokenIds):
        raise PromptError("choices are texts, which cannot follow token ids")
    if isinstance(tokens, UserError):
        raise tokens
    tokenized = model.tokenizer.encode_choices(request.prompt, choices, tokens)
    longest = max(map(len, tokenized))
    prompt = model.tokenize(request, spare=longest, continuation="its longest choice", tokens=tokens)
    return _Prompt(request.id, prompt.prefix, prompt.suffix, tokenized)


def _dispatch(model: LoadedModel, batch: PackedBatch, prefix: Prefix | None) -> _Call:
    """Calls both passes."""
    width = model.sizing.prompts_of_row(batch.tokens.shape[1], max(map(len, batch.rows)))
    choices = max(len(prompt.choices) for row in batch.rows for prompt, _ in row)
    indices = np.zeros((len(batch.rows), width), np.int32)
    targets = np.zeros((len(batch.rows), width, choices), np.int32)
    for r, row in enumerate(batch.rows):
        for i, (prompt, begin) in enumerate(row):
            indices[r, i] = begin + len(prompt.tokens) - 1
            targets[r, i] = [choice[0] if choice else 0 for choice in prompt.choices]
    has_long = any(len(choice) > 1 for row in batch.rows for prompt, _ in row for choice in prompt.choices)
    sharding = rows_sharding(model.mesh)
    packed, indices, targets = put((batch.tokens, indices, targets), sharding)
    first, cache = packed_logprobs(
        model.params, packed, indices, targets, prefix, collect_kv=has_long, **model.static_args
    )
    second = []
    for second_pass in _second_passes(batch):
        inputs = put(_second_inputs(second_pass, model.sizing), sharding)
        logprobs = second_logprobs(model.params, cache, packed, inputs, prefix, **model.static_args)
        second.append((second_pass, logprobs))
    return _Call(first, second)


def _second_passes(batch: PackedBatch) -> Iterator[_SecondPass]:
    """Distributes the long choices of each row over second passes."""
    rows = [
        [
            _LongChoice(segment, i, tokens, len(prompt.tokens))
            for segment, (prompt, _) in enumerate(row, start=1)
            for i, tokens in enumerate(prompt.choices)
            if len(tokens) > 1
        ]
        for row in batch.rows
    ]
    return itertools.zip_longest(*map(_row_passes, rows), fillvalue=[])


def _row_passes(choices: list[_LongChoice]) -> Iterator[list[tuple[int, _LongChoice]]]:
    """Yields a row's long choices, and where each begins, in passes of at most `SECOND_PASS_TOKENS`."""
    part, used = [], 0
    for choice in sorted(choices, key=lambda choice: -choice.width):
        if part and used + choice.width > SECOND_PASS_TOKENS:
            yield part
            part, used = [], 0
        part.append((used, choice))
        used += choice.width
    if part:
        yield part


def _second_inputs(second_pass: _SecondPass, sizing: Sizing) -> np.ndarray:
    """Returns the tokens [R, W, 5] int32 of a second pass."""
    end = max(begin + choice.width for row in second_pass for begin, choice in row)
    inputs = np.zeros((len(second_pass), sizing.second_pass(end), COLUMNS), np.int32)
    inputs[..., _PROMPT] = -1
    for columns, row in zip(inputs, second_pass):
        for begin, choice in row:
            choice.write(columns[begin : begin + choice.width])
    return inputs


def _results(batch: PackedBatch, call: _Call) -> Iterator[ChoiceLogprobs]:
    first = np.asarray(jax.device_get(call.first), np.float64)
    second = [(row_choices, np.asarray(jax.device_get(values), np.float64)) for row_choices, values in call.second]
    for r, row in enumerate(batch.rows):
        sums = [
            [float(value) if choice else 0.0 for choice, value in zip(prompt.choices, first[r, i])]
            for i, (prompt, _) in enumerate(row)
        ]
        for row_choices, values in second:
            for begin, choice in row_choices[r]:
                sums[choice.segment - 1][choice.choice] += float(values[r, begin : begin + choice.scored].sum())
        for (prompt, _), logprobs in zip(row, sums):
            yield ChoiceLogprobs(prompt.id, tuple(_without_longer(prompt.choices, logprobs)))


def _without_longer(choices: Sequence[Sequence[int]], logprobs: Sequence[float]) -> list[float]:
    """Returns the log-probability of each choice without that of the choices that begin with its tokens."""
    return [
        logprob + _log_rest([logprobs[j] - logprob for j in _next_longer(choices, i)])
        for i, logprob in enumerate(logprobs)
    ]


def _next_longer(choices: Sequence[Sequence[int]], index: int) -> list[int]:
    """Returns the longer choices that begin with a choice, without those that begin with another one of them."""

    def begins(short: Sequence[int], long: Sequence[int]) -> bool:
        return len(short) < len(long) and list(long[: len(short)]) == list(short)

    longer = [j for j, choice in enumerate(choices) if begins(choices[index], choice)]
    # Of equal choices the first one stands for all.
    distinct = [j for j in longer if not any(choices[k] == choices[j] for k in longer if k < j)]
    return [j for j in distinct if not any(begins(choices[k], choices[j]) for k in distinct)]


def _log_rest(logprobs: Sequence[float]) -> float:
    """Returns the natural logarithm of what several probabilities leave of 1."""
    rest = 1.0 - sum(math.exp(min(logprob, 0.0)) for logprob in logprobs)
    return math.log(rest) if rest > 0 else -math.inf


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def second_logprobs(
    params: dict,
    cache: KVCache,
    packed: jax.Array,
    inputs: jax.Array,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Returns log-probabilities [R, W] (float32) of the tokens of long choices, in a second pass.

    Args:
        params: weights.
        cache: keys and values of the packed rows.
        packed: [R, T, 4] int32, the rows of the first pass.
        inputs: [R, W, 5] int32, see the columns above; the tokens of a choice are consecutive.
        prefix: tokens that all the prompts follow.
    """
    packed, inputs = constrain_rows(packed, mesh), constrain_rows(inputs, mesh)
    segments, prefix_tokens = inputs[..., _PROMPT], prefix_length(prefix)
    own_prompt = segments[:, :, None] == packed[:, None, :, SEGMENT]  # [R, W, T]
    prompt_kv = PrefixKV(cache, own_prompt, packed[..., POSITION] + prefix_tokens)
    hidden, _ = forward(
        params,
        architecture,
        inputs[..., _TOKEN],
        inputs[..., _POSITION] + prefix_tokens,
        decode_setup(mesh, compute_dtype),
        segment_ids=segments * MAX_CHOICES + inputs[..., _CHOICE],
        prefix_kv=(*prefix_kv(prefix), prompt_kv),
    )
    logprobs = target_logprobs(params, architecture, hidden, inputs[..., _TARGET:], compute_dtype)
    return replicate(logprobs[..., 0], mesh)
