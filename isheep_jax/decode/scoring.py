"""Probabilities by prefill alone: of given continuations of prompts, and hidden states as embeddings of prompts.

Prompts behind the same head are packed into rows, and the head is computed once. A row's last hidden states give the
first token of every choice. Where choices have more tokens, these see their prompt's keys and values in a second pass.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.decode.cache import (
    alignment,
    bucket_of,
    constrain_cache,
    constrain_rows,
    data_shards,
    decode_setup,
    replicate,
)
from isheep_jax.decode.packing import AT, SEGMENT, TOKEN, Row, empty_rows, fill, pack
from isheep_jax.decode.programs import Prefix, prefix_kv, prefix_length
from isheep_jax.decode.requests import ChoiceLogprobs, Embedding, Request, TextLogprob
from isheep_jax.decode.tokenization import TooLong
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.kv_cache import KVCache, PrefixKV
from isheep_jax.model.transformer import forward, logits

if TYPE_CHECKING:
    from isheep_jax.decode.engine import Engine

# Logits of so many positions of each row exist at a time.
_POSITIONS = 128
# Tokens of the second pass over a row; more take several.
_BRANCH_TOKENS = 512
# Calls that are on their way while the results of the one before are read.
_AHEAD = 1

# Columns of the second pass [W, 5] (int32): a token, its place behind the shared tokens, the segment of its prompt (-1:
# padding), its choice, and the token that follows.
_TOKEN, _AT, _PROMPT, _BRANCH, _TARGET = range(5)


@dataclass(eq=False)
class _Item:
    """What is scored. tokens: prompt [T] behind the shared ones. continuations: of the prompt, each as tokens.

    along: the only continuation's tokens stand behind the prompt in `tokens`, all but the last. at: the position of the
    prompt's last token. parts: what is known of each continuation's log-probability.
    """

    id: str
    shared: tuple[int, ...]
    tokens: np.ndarray
    at: int
    continuations: list[list[int]]
    along: bool
    parts: list[float] = field(default_factory=list)


T = TypeVar("T")


def score_choices(engine: "Engine", requests: Sequence[Request], choices: Sequence[str]) -> Iterator[ChoiceLogprobs]:
    """Sums of log p(token) over each choice's tokens after each prompt; longest prompts first.

    A prompt that does not fit the context with a choice, or whose tokens a choice changes, is an error of that request.
    """
    for result in _score(engine, requests, [tuple(choices)] * len(requests), along=False):
        if isinstance(result, _Item):
            yield ChoiceLogprobs(result.id, tuple(result.parts))
        else:
            yield ChoiceLogprobs(result[0], error=result[1])


def score_texts(engine: "Engine", requests: Sequence[Request], texts: Sequence[str]) -> Iterator[TextLogprob]:
    """The same for one text each, however long; after a conversation it is the response that the template writes."""
    for result in _score(engine, requests, [(text,) for text in texts], along=True):
        if isinstance(result, _Item):
            yield TextLogprob(result.id, result.parts[0], len(result.continuations[0]))
        else:
            yield TextLogprob(result[0], error=result[1])


def embed(engine: "Engine", requests: Sequence[Request]) -> Iterator[Embedding]:
    """Means of the last hidden states over the prompts."""
    items = []
    for request in requests:
        try:
            prompt = engine.tokenize(Request(request.id, request.prompt), spare=0)
        except TooLong as error:
            yield Embedding(request.id, error=str(error))
        else:
            items.append(_Item(request.id, (), prompt.own, 0, [], False))

    def send(rows: list[tuple[list[_Item], Row] | None], length: int):
        packed = _packed(rows, length)
        segments = 1 << max(max((len(row.prompts) for _, row in filter(None, rows)), default=1) - 1, 0).bit_length()
        return _embed_rows(engine.params, packed, segments=segments, **engine.static)

    def receive(rows, vectors) -> Iterator[Embedding]:
        for (some, row), means in zip(rows, np.asarray(vectors)):
            for index, mean in zip(row.prompts, means):
                yield Embedding(some[index].id, tuple(mean.tolist()))

    yield from _in_rows(engine, items, send, receive)


def _score(
    engine: "Engine", requests: Sequence[Request], choices: Sequence[tuple[str, ...]], along: bool
) -> Iterator[_Item | tuple[str, str]]:
    groups: dict[tuple[int, ...], list[_Item]] = {}
    for request, texts in zip(requests, choices):
        try:
            item = _item(engine, request, texts, along)
        except UserError as error:
            yield request.id, str(error)
        else:
            groups.setdefault(item.shared, []).append(item)
    for shared, items in sorted(groups.items()):
        prefix = engine.prefix(shared)
        branches = max((len(c) for item in items for c in item.continuations), default=1) > 1 and not along

        def send(rows, length, prefix=prefix, branches=branches):
            return _send(engine, rows, length, prefix, branches)

        yield from _in_rows(engine, items, send, _receive)


def _item(engine: "Engine", request: Request, texts: tuple[str, ...], along: bool) -> _Item:
    if along and not isinstance(request.prompt, str):
        # The response as the chat template writes it, which may begin with a space; without the end of the turn.
        ids, mask = engine.tokenizer.encode_example(request.prompt, texts[0])
        continuations = [[token for token, trained in zip(ids, mask) if trained][:-1]]
    else:
        continuations = engine.tokenizer.encode_choices(request.prompt, texts)
    longest = max(map(len, continuations), default=1)
    try:
        prompt = engine.tokenize(request, spare=longest)
    except TooLong as error:
        short = "; decode.max_length=" not in str(error)
        raise (error if short else TooLong(_misfit(error, longest, engine.config.max_length))) from None
    tokens, at = prompt.own, len(prompt.own) - 1
    if along and continuations[0]:
        tokens = np.concatenate([tokens, np.asarray(continuations[0][:-1], np.int32)])
    return _Item(request.id, prompt.shared, tokens, at, continuations, along)


def _misfit(error: TooLong, longest: int, context: int) -> str:
    prompt = str(error).partition(";")[0]
    return f"{prompt} and its longest choice {longest}; decode.max_length={context} must hold both"


def _in_rows(
    engine: "Engine",
    items: list[_Item],
    send: Callable[[list, int], Any],
    receive: Callable[[list, Any], Iterator[T]],
) -> Iterator[T]:
    """Packs the items into rows, as many in a call as there are data shards, and reads results a call behind."""
    items = sorted(items, key=lambda item: (-len(item.tokens), item.id))
    align, shards = alignment(engine.mesh), data_shards(engine.mesh)
    waiting: dict[int, list] = {}
    sent: deque = deque()

    def calls() -> Iterator[tuple[int, list]]:
        for row in pack([len(item.tokens) for item in items], align):
            length = bucket_of(row.used, align)
            rows = waiting.setdefault(length, [])
            rows.append((items, row))
            if len(rows) == shards:
                yield length, waiting.pop(length)
        yield from waiting.items()

    for length, rows in calls():
        engine.statistics.prompt_tokens += sum(len(items[index].tokens) for _, row in rows for index in row.prompts)
        engine.statistics.prompt_room += shards * length
        sent.append((rows, send([*rows, *[None] * (shards - len(rows))], length)))
        if len(sent) > _AHEAD:
            yield from receive(*sent.popleft())
    while sent:
        yield from receive(*sent.popleft())


def _packed(rows: list[tuple[list[_Item], Row] | None], length: int) -> np.ndarray:
    packed = empty_rows(len(rows), length)
    for r, entry in enumerate(rows):
        if entry:
            items, row = entry
            for segment, (index, begin) in enumerate(zip(row.prompts, row.begins), start=1):
                fill(packed[r], begin, segment, items[index].tokens)
    return packed


@dataclass(frozen=True)
class _Branch:
    """A choice of several tokens: its prompt's segment in the row, which choice, and where its first token stands."""

    segment: int
    choice: int
    tokens: list[int]
    at: int

    @property
    def room(self) -> int:
        """Tokens of the second pass kept for it. A power of two, so that its sums are the same wherever it lies."""
        return 1 << (len(self.tokens) - 2).bit_length()

    def write(self, part: np.ndarray) -> None:
        """Into a part [room, 5] of the second pass."""
        count = len(self.tokens) - 1
        part[:count, _TOKEN], part[:count, _TARGET] = self.tokens[:-1], self.tokens[1:]
        part[:count, _AT] = self.at + np.arange(count)
        part[:count, _PROMPT] = self.segment
        part[:count, _BRANCH] = self.choice


def _second_passes(branches: list[_Branch]) -> Iterator[list[tuple[int, _Branch]]]:
    """The branches of a row, and where each begins, in passes."""
    part, used = [], 0
    for branch in sorted(branches, key=lambda branch: -branch.room):
        if part and used + branch.room > _BRANCH_TOKENS:
            yield part
            part, used = [], 0
        part.append((used, branch))
        used += branch.room
    if part:
        yield part


def _send(engine: "Engine", rows: list, length: int, prefix: Prefix | None, branches: bool) -> tuple[Any, list]:
    """Both passes of a call. Returns the first's log-probabilities, and of each second pass what it scores and them."""
    places: list[list[tuple[int, list[int]]]] = []  # of each row: position, tokens asked for there
    second: list[list[_Branch]] = []
    for entry in rows:
        asked, more = [], []
        for segment, (item, begin) in enumerate(_members(entry), start=1):
            if item.along:
                asked += [(begin + item.at + i, [token]) for i, token in enumerate(item.continuations[0])]
            else:
                asked.append((begin + item.at, [c[0] if c else 0 for c in item.continuations]))
                more += [
                    _Branch(segment, choice, tokens, item.at + 1)
                    for choice, tokens in enumerate(item.continuations)
                    if len(tokens) > 1
                ]
        places.append(asked)
        second.append(more)
    width = 1 << max(max(map(len, places)) - 1, 0).bit_length()
    choices = max((len(tokens) for asked in places for _, tokens in asked), default=1)
    at, targets = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width, choices), np.int32)
    for r, asked in enumerate(places):
        for i, (position, tokens) in enumerate(asked):
            at[r, i], targets[r, i, : len(tokens)] = position, tokens
    packed = _packed(rows, length)
    first, cache = _score_rows(engine.params, packed, at, targets, prefix, collect=branches, **engine.static)
    passes = []
    for some in itertools.zip_longest(*map(_second_passes, second), fillvalue=[]):
        width = max(32, 1 << (max(begin + branch.room for part in some for begin, branch in part) - 1).bit_length())
        inputs = np.zeros((len(rows), width, 5), np.int32)
        inputs[..., _PROMPT] = -1
        for row, part in zip(inputs, some):
            for begin, branch in part:
                branch.write(row[begin : begin + branch.room])
        passes.append((some, _score_branches(engine.params, cache, packed, inputs, prefix, **engine.static)))
    return first, passes


def _members(entry) -> list[tuple[_Item, int]]:
    if entry is None:
        return []
    items, row = entry
    return [(items[index], begin) for index, begin in zip(row.prompts, row.begins)]


def _receive(rows: list, results: tuple[Any, list]) -> Iterator[_Item]:
    first, passes = np.asarray(results[0], np.float64), [(part, np.asarray(x, np.float64)) for part, x in results[1]]
    for r, entry in enumerate(rows):
        members, i = [item for item, _ in _members(entry)], 0
        for item in members:
            if item.along:
                count = len(item.continuations[0])
                item.parts = [float(first[r, i : i + count, 0].sum())]
                i += count
            else:
                item.parts = [float(x) if c else 0.0 for c, x in zip(item.continuations, first[r, i])]
                i += 1
        for some, found in passes:
            for begin, branch in some[r]:
                found_here = found[r, begin : begin + len(branch.tokens) - 1]
                members[branch.segment - 1].parts[branch.choice] += float(found_here.sum())
        yield from members


@functools.partial(jax.jit, static_argnames=("collect", "architecture", "mesh", "compute_dtype"))
def _score_rows(
    params: dict,
    packed: np.ndarray,
    at: np.ndarray,
    targets: np.ndarray,
    prefix: Prefix | None,
    *,
    collect: bool,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, KVCache | None]:
    """Log-probabilities [R, U, C] (float32) of tokens, and with `collect` the keys and values of the rows.

    packed: [R, T, 4], see `packing`. at: [R, U], positions of a row whose next token is asked for. targets: [R, U, C],
    which tokens.
    """
    packed, at, targets = (constrain_rows(x, mesh) for x in (packed, at, targets))
    hidden, cache = forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., AT] + prefix_length(prefix),
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
        prefix_kv=prefix_kv(prefix),
        collect_kv=collect,
    )
    hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
    scores = _logprobs(params, architecture, hidden, targets, compute_dtype)
    return replicate(scores, mesh), constrain_cache(cache, mesh) if collect else None


@functools.partial(jax.jit, static_argnames=("architecture", "mesh", "compute_dtype"))
def _score_branches(
    params: dict,
    cache: KVCache,
    packed: np.ndarray,
    inputs: np.ndarray,
    prefix: Prefix | None,
    *,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Log-probabilities [R, W] (float32) of what follows further tokens of choices.

    cache: of the rows `packed`. inputs: [R, W, 5], see the columns above; tokens of a choice are next to each other.
    """
    packed, inputs = constrain_rows(packed, mesh), constrain_rows(inputs, mesh)
    prompts, before = inputs[..., _PROMPT], prefix_length(prefix)
    own = PrefixKV(cache, prompts[:, :, None] == packed[:, None, :, SEGMENT], packed[..., AT] + before)
    hidden, _ = forward(
        params,
        architecture,
        inputs[..., _TOKEN],
        inputs[..., _AT] + before,
        decode_setup(mesh, compute_dtype),
        segment_ids=prompts * 1024 + inputs[..., _BRANCH],
        prefix_kv=(*prefix_kv(prefix), own),
    )
    scores = _logprobs(params, architecture, hidden, inputs[..., _TARGET:], compute_dtype)
    return replicate(scores[..., 0], mesh)


@functools.partial(jax.jit, static_argnames=("segments", "architecture", "mesh", "compute_dtype"))
def _embed_rows(
    params: dict,
    packed: np.ndarray,
    *,
    segments: int,
    architecture: Architecture,
    mesh: Mesh | None,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """Means [R, segments, D] (float32) over the tokens of each segment of packed rows."""
    packed = constrain_rows(packed, mesh)
    hidden, _ = forward(
        params,
        architecture,
        packed[..., TOKEN],
        packed[..., AT],
        decode_setup(mesh, compute_dtype),
        segment_ids=packed[..., SEGMENT],
    )
    mine = (packed[:, None, :, SEGMENT] == 1 + jnp.arange(segments)[:, None]).astype(jnp.float32)
    total = jnp.einsum("rst,rtd->rsd", mine, hidden.astype(jnp.float32))
    return replicate(total / jnp.maximum(mine.sum(axis=-1, keepdims=True), 1.0), mesh)


def _logprobs(params, architecture, hidden: jax.Array, targets: jax.Array, compute_dtype) -> jax.Array:
    """Log-probabilities [R, U, C] of the targets after hidden states [R, U, D], some positions at a time."""
    R, U, C = targets.shape

    def some(inputs):
        hidden, targets = inputs
        scores = logits(params, architecture, hidden, compute_dtype)
        chosen = jnp.take_along_axis(scores, targets, axis=-1)
        return chosen - jax.nn.logsumexp(scores, axis=-1, keepdims=True)

    size = min(U, _POSITIONS)
    pieces = [x.reshape(R, U // size, size, -1).swapaxes(0, 1) for x in (hidden, targets)]
    return jax.lax.map(some, tuple(pieces)).swapaxes(0, 1).reshape(R, U, C)
