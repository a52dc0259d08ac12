"""The harness's view of a model: its requests as tokens for the engine; every answer is kept, by what it depends on."""

import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from etils import epath
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from isheep_jax import distributed
from isheep_jax.decode.requests import Request, SamplingParams, TokenIds
from isheep_jax.errors import UserError
from isheep_jax.loop.protocols import OpenProgress, TokenModel
from isheep_jax.loop.stage_files import StageFiles
from isheep_jax.text.conversation import Conversation, Message

# Requests that are scored together, and kept together. Sums of another batch may differ in their last bit, so that a
# batch is answered as a whole or not at all.
_BATCH = 512
# Completions per part: what a kill can cost.
_PART = 32
# New tokens where neither task nor settings say how many; as in the harness.
_MAX_TOKENS = 256
# Settings of a task's generation that the engine has; the others that occur change nothing (num_beams: 1).
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


@dataclass(frozen=True)
class Answer:
    """An answer of a model; a line of `answers/part-*.jsonl`.

    key: sha256 of everything that it depends on, the weights among it.
    logprob, greedy: of a continuation, as in `TextLogprob`.
    text, finish_reason: of a completion, as in `Completion`.
    """

    key: str
    logprob: float | None = None
    greedy: bool | None = None
    text: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Pair:
    """A context and its continuation. prefix: how many tokens of the context others share."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    prefix: int = 0

    @property
    def order(self) -> tuple:
        """Pairs that share a prefix together, longer ones first."""
        return self.context[: self.prefix], -len(self.context) - len(self.continuation), self.context, self.continuation


@dataclass(frozen=True)
class _Prompt:
    """A prompt to complete. occurrence: counts equal prompts, whose sampled completions differ."""

    tokens: tuple[int, ...]
    sampling: SamplingParams
    occurrence: int = 0


class HarnessModel(TemplateLM):
    """A `TokenModel` for the harness, alike in every process.

    digests: of the prompts of each kind of request, once it was asked.
    finish_reasons: of each completion.
    cut_off: prompts with their completions that were.
    """

    def __init__(
        self,
        model: TokenModel,
        directory: epath.Path,
        *,
        task: str,
        facts: Mapping[str, Any],
        max_tokens: int,
        progress: OpenProgress,
    ):
        """Reads the answers that are kept.

        Args:
            model: What answers.
            directory: Where answers are kept.
            task: Name of the task, for messages.
            facts: What answers depend on besides the request: weights, chat template, dtypes, seed.
            max_tokens: New tokens per completion; 0: as many as the task says.
            progress: Opens a progress bar.
        """
        super().__init__()
        self._model, self._task, self._progress = model, task, progress
        self._max_tokens = max_tokens
        self._facts = json.dumps(facts, sort_keys=True)
        self._files = StageFiles(directory, Answer, "")
        parts = self._files.parts()
        self._parts = len(parts)
        self._answers = {answer.key: answer for part in parts for answer in part}
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_uncached)
        self.digests: dict[str, str] = {}
        self.finish_reasons: list[str] = []
        self.cut_off: set[tuple[str, str]] = set()

    # What the harness asks about tokenizer and template.

    @property
    def max_length(self) -> int:
        return self._model.max_length

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        start = self._model.tokenizer.start_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return hashlib.sha256(self._facts.encode()).hexdigest()

    def chat_template(self, chat_template: bool | str = False) -> str:
        return json.loads(self._facts).get("chat_template", "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the rendered conversation; where its last turn is a beginning of the answer, up to its end."""
        turns = tuple(Message(turn["role"], turn["content"]) for turn in chat_history)
        if add_generation_prompt:
            return self._render(turns)
        return self._render(turns[:-1]) + turns[-1].content

    def _render(self, turns: Conversation) -> str:
        try:
            return self._model.tokenizer.render(turns)
        except UserError:
            others = tuple(turn for turn in turns if turn.role != "system")
            if len(others) == len(turns):
                raise
            return self._model.tokenizer.render(others)  # the template knows no system turn

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text. None: beginning-of-text first, unless the text has it from the template."""
        return list(self._encode(string, add_special_tokens))

    def _encode_uncached(self, text: str, bos: bool | None) -> tuple[int, ...]:
        tokenizer = self._model.tokenizer
        if bos is None:
            bos = tokenizer.bos_id is None or not text.startswith(tokenizer.spell([tokenizer.bos_id]))
        return tuple(tokenizer.encode(text, bos=bos))

    # The three kinds of request.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._encode_any_pair(*request.args) for request in requests]
        answers = self._score(pairs, [request.task_name for request in requests], "loglikelihood")
        return [(answer.logprob, answer.greedy) for answer in answers]

    def _encode_any_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(a.logprob, a.greedy) for a in self._score(pairs, [""] * len(pairs), "loglikelihood")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, a window of the model's length after the other."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # the engine counts the last token, too, which is only predicted
                context_len=1,
            )
            for part in map(make_disjoint_window, parts):
                windows.append(part)
                owners.append(owner)
        answers = self._score(windows, [""] * len(windows), "loglikelihood_rolling")
        sums = [0.0] * len(requests)
        for owner, answer in zip(owners, answers):
            sums[owner] += answer.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, seen = [], Counter()
        for request in requests:
            context, arguments = request.args
            sampling = self._sampling(arguments)
            room = self.max_length - sampling.max_tokens
            if room <= 0:
                raise UserError(
                    f"{self._task} asks for {sampling.max_tokens} new tokens, and prompts with them may have "
                    f"{self.max_length}; set --evaluate.max_tokens lower or --decode.max_length higher"
                )
            prompt = _Prompt(tuple(self.tok_encode(context)[-room:]), sampling)
            if sampling.temperature:
                seen[prompt] += 1
                prompt = replace(prompt, occurrence=seen[prompt])
            prompts.append(prompt)
        answers = self._complete(prompts, [request.task_name for request in requests])
        self.finish_reasons += [answer.finish_reason for answer in answers]
        self.cut_off |= {(r.args[0], a.text) for r, a in zip(requests, answers) if a.finish_reason == "length"}
        return [answer.text for answer in answers]

    def _sampling(self, arguments: Mapping[str, Any]) -> SamplingParams:
        """Returns a task's settings of generation. Raises `UserError` for a search that the engine does not have."""
        known = normalize_gen_kwargs(dict(arguments), _MAX_TOKENS)
        if known.get("num_beams", 1) != 1:
            raise UserError(f"{self._task} searches with {known['num_beams']} beams; the engine has no beam search")
        sampled = known["do_sample"]
        return SamplingParams(
            temperature=float(arguments.get("temperature") or 1.0) if sampled else 0.0,
            max_tokens=self._max_tokens or known["max_gen_toks"],
            stop=tuple(dict.fromkeys(stop for stop in known["until"] or () if stop)),
            **{name: known[name] for name in _SAMPLING if name in known and sampled},
        )

    # Answers: kept ones, and the others from the model.

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], tasks: Sequence[str], kind: str) -> list[Answer]:
        """Returns an answer to each pair of context and continuation. tasks: of each; contexts may share a prefix."""
        cut = [self._cut(tuple(context), tuple(continuation)) for context, continuation in pairs]
        shared = _shared_lengths([pair.context for pair in cut], tasks)
        cut = [replace(pair, prefix=shared[task]) for pair, task in zip(cut, tasks)]
        keys = {pair: self._key("score", pair.context, pair.continuation) for pair in cut}
        self._agree(kind, [keys[pair] for pair in cut])
        todo = sorted(keys, key=lambda pair: pair.order)
        with self._progress("log-likelihoods", len(todo), "requests") as bar:
            for start in range(0, len(todo), _BATCH):
                batch = todo[start : start + _BATCH]
                if not all(keys[pair] in self._answers for pair in batch):
                    self._keep(self._score_batch(batch, keys))
                bar.advance(len(batch))
        return [self._answers[keys[pair]] for pair in cut]

    def _cut(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> _Pair:
        room = self.max_length - len(continuation)
        if room <= 0:
            raise UserError(
                f"{self._task} has a continuation of {len(continuation)} tokens, and prompts with them may have "
                f"{self.max_length}; set --decode.max_length higher"
            )
        return _Pair(context[-room:], continuation)

    def _score_batch(self, batch: Sequence[_Pair], keys: Mapping[_Pair, str]) -> list[Answer]:
        requests = [
            Request(keys[pair], TokenIds(pair.context), TokenIds(pair.context[: pair.prefix])) for pair in batch
        ]
        results = self._model.text_logprobs(requests, [TokenIds(pair.continuation) for pair in batch])
        by_key = {result.id: result for result in results}
        for result in by_key.values():
            if result.error:
                raise UserError(f"{self._task}: {result.error}")
        # In the order of the batch, so that every run writes the same part.
        return [Answer(k, by_key[k].logprob, by_key[k].greedy) for k in map(keys.__getitem__, batch)]

    def _complete(self, prompts: Sequence[_Prompt], tasks: Sequence[str]) -> list[Answer]:
        """Returns an answer to each prompt. tasks: of each; prompts may share a prefix."""
        shared = _shared_lengths([prompt.tokens for prompt in prompts], tasks)
        keys = {
            prompt: self._key("complete", prompt.tokens, vars(prompt.sampling), prompt.occurrence) for prompt in prompts
        }
        prefixes = {prompt: prompt.tokens[: shared[task]] for prompt, task in zip(prompts, tasks)}
        self._agree("generate_until", [keys[prompt] for prompt in prompts])
        groups: dict[SamplingParams, list[_Prompt]] = defaultdict(list)
        for prompt, key in keys.items():
            if key not in self._answers:
                groups[prompt.sampling].append(prompt)
        with self._progress("completions", len(keys), "completions") as bar:
            bar.advance(len(keys) - sum(map(len, groups.values())))
            for sampling, group in groups.items():
                requests = [Request(keys[p], TokenIds(p.tokens), TokenIds(prefixes[p])) for p in group]
                self._complete_group(requests, sampling, bar.advance)
        return [self._answers[keys[prompt]] for prompt in prompts]

    def _complete_group(
        self, requests: Sequence[Request], sampling: SamplingParams, advance: Callable[[int], None]
    ) -> None:
        waiting: list[Answer] = []
        for completion in self._model.generate(requests, sampling):
            if completion.finish_reason == "error":
                raise UserError(f"{self._task}: {completion.error}")
            waiting.append(Answer(completion.id, text=completion.text, finish_reason=completion.finish_reason))
            advance(1)
            if len(waiting) == _PART:
                self._keep(waiting)
                waiting = []
        self._keep(waiting)

    def _keep(self, answers: Sequence[Answer]) -> None:
        if answers:
            self._files.write_part(self._parts, answers)
            self._parts += 1
            self._answers |= {answer.key: answer for answer in answers}

    def _key(self, *request: Any) -> str:
        return hashlib.sha256(json.dumps([self._facts, *request]).encode()).hexdigest()

    def _agree(self, kind: str, keys: Iterable[str]) -> None:
        """Notes the digest of the requests, which every process must have built alike."""
        self.digests[kind] = hashlib.sha256("\n".join(keys).encode()).hexdigest()
        distributed.check_agreement({f"the requests of {self._task}": self.digests[kind]})


def _shared_lengths(contexts: Sequence[tuple[int, ...]], tasks: Sequence[str]) -> dict[str, int]:
    """Returns for each task how many tokens all its contexts begin with; "" is no task."""
    by_task: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for context, task in zip(contexts, tasks):
        by_task[task].append(context)
    return {task: _common(group) if task else 0 for task, group in by_task.items()}


def _common(contexts: Sequence[tuple[int, ...]]) -> int:
    """Returns how many tokens all the contexts begin with, so that each has a token of its own after them."""
    # Of sorted sequences the first and the last have the least in common.
    first, last = min(contexts), max(contexts)
    common = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    return min(common, min(map(len, contexts)) - 1)
