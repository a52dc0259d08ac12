"""Verdicts of a judge on responses: of a model behind a server, or of a local model's probabilities.

Verdicts are kept as they arrive, by the sha256 of what the judge is asked, so that a judging that was killed goes on
and equal questions are asked once.

evaluation/TASK/verdicts/part-*.jsonl   verdicts, each with its key
evaluation/TASK/judging.json            who judged, how many verdicts, tokens sent and received
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.chat_server import Answer, ChatServer
from isheep_jax.config import EvaluateConfig, is_server
from isheep_jax.config_checks import check_server
from isheep_jax.decode.requests import ChoiceLogprobs, Request
from isheep_jax.errors import UserError, quoted
from isheep_jax.evaluation.task import Scoring
from isheep_jax.files import on_object_store, utf8, write_atomically, write_json
from isheep_jax.loop.protocols import Model, StageReporter
from isheep_jax.text.conversation import Conversation

# Seconds for one answer: a judge may explain at length, behind others.
_TIMEOUT = 600.0
# A judge of whose first verdicts none can be read is not paid for the others.
_UNREAD_AT_FIRST = 20
# Verdicts per file. The last file is written anew with each verdict; in a bucket no more than once a second, which is
# how often an object may change there.
_PART = 64
_SECONDS_IN_BUCKETS = 1.0


@dataclass(frozen=True)
class Question:
    """A question to a judge.

    messages: the conversation that it answers.
    choices: verdicts of which a local judge gives the probabilities.
    max_tokens: of a server's answer.
    first_token: whether the answer's first token is the verdict, so that its probabilities are asked for.
    """

    messages: Conversation
    choices: tuple[str, ...]
    max_tokens: int
    first_token: bool = False


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to a question.

    text: of a server's answer, without a thought before it.
    alternatives: most probable tokens of a server's answer with their logprobs, token by token.
    logprobs: of a local judge: of each choice.
    error: why there is no answer ("": there is one).
    sent, received: tokens as the server counts them.
    """

    text: str = ""
    alternatives: tuple[Mapping[str, float], ...] = ()
    logprobs: tuple[float, ...] = ()
    error: str = ""
    sent: int = 0
    received: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Verdict":
        """Returns the verdict of which `dataclasses.asdict` gives these values."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_judge(settings: EvaluateConfig) -> None:
    """Raises `UserError` where the settings name a server badly, or no model on it."""
    if is_server(settings.judge):
        check_server("evaluate", settings.judge, settings.judge_key)
    if is_server(settings.judge) and not settings.judge_model:
        raise UserError("--evaluate.judge_model: it is empty; name the model that the server of --evaluate.judge has")


def ask_judge(
    questions: Sequence[Question], scoring: Scoring, is_readable: Callable[[Question, Verdict], bool]
) -> list[Verdict]:
    """Returns the judge's verdict on each question; those that are kept from an earlier call are not asked again.

    is_readable: whether a verdict says what was asked.
    Raises `UserError` when the server fails for good, or when none of its first verdicts is readable.
    """
    with_server = is_server(scoring.settings.judge)
    judge = _ServerJudge(scoring.settings) if with_server else _LocalJudge(scoring)
    by_key = {judge.key(question): question for question in questions}
    kept = _KeptVerdicts(scoring.directory / "verdicts")
    with scoring.progress("judge", len(by_key), "verdicts") as bar:
        session = _Session(judge, kept, bar, is_readable)
        if with_server:
            # One process talks to the server; what it hears travels as JSON.
            values = distributed.from_primary(
                lambda: {key: dataclasses.asdict(verdict) for key, verdict in session.ask(by_key).items()}
            )
            verdicts = {key: Verdict.from_json(value) for key, value in values.items()}
        else:
            verdicts = session.ask(by_key)
    return [verdicts[judge.key(question)] for question in questions]


class _ServerJudge:
    """A model behind an OpenAI-compatible server, which answers with text."""

    def __init__(self, settings: EvaluateConfig):
        self.name, self._settings = settings.judge_model, settings
        self._server = ChatServer(
            settings.judge,
            settings.judge_model,
            settings.judge_key,
            concurrency=settings.judge_requests,
            setting="evaluate.judge",
            timeout=_TIMEOUT,
        )

    def key(self, question: Question) -> str:
        return _digest({"model": self.name, **_body(question)})

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        for index, answer in self._server.answers([_body(question) for question in questions]):
            yield index, _verdict_of(answer)

    def facts(self) -> dict[str, Any]:
        return {"judge": self._settings.judge, "model": self.name, "left_out": list(self._server.concessions)}


class _LocalJudge:
    """A model of this machine, which gives probabilities of the choices."""

    def __init__(self, scoring: Scoring):
        self.name, self._judge = scoring.settings.judge, scoring.judge

    def key(self, question: Question) -> str:
        return _digest({"model": self._judge.digest, "messages": _messages(question), "choices": question.choices})

    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """Yields the index of each question with its verdict.

        A model without a chat template, or one whose template changes the choices' tokens, continues a text.
        """
        if not questions:
            return
        model = self._judge.load()
        by_choices: dict[tuple[str, ...], list[int]] = {}
        for index, question in enumerate(questions):
            by_choices.setdefault(question.choices, []).append(index)
        for choices, indices in by_choices.items():
            failed = []
            for index, result in _choice_logprobs(model, {i: questions[i].messages for i in indices}, choices):
                if result.error:
                    failed.append(index)
                else:
                    yield index, Verdict(logprobs=result.logprobs)
            texts = {i: _as_text(questions[i]) for i in sorted(failed)}
            for index, result in _choice_logprobs(model, texts, [f" {choice}" for choice in choices]):
                yield index, Verdict(logprobs=result.logprobs, error=result.error)

    def facts(self) -> dict[str, Any]:
        return {"judge": self.name, "weights": self._judge.digest}


@dataclass
class _Session:
    """Asks a judge what is not kept yet, keeps what it says, and shows how far it is and what it costs."""

    judge: _ServerJudge | _LocalJudge
    kept: "_KeptVerdicts"
    bar: StageReporter
    is_readable: Callable[[Question, Verdict], bool]

    def ask(self, by_key: Mapping[str, Question]) -> dict[str, Verdict]:
        """Returns the verdicts by key."""
        verdicts = {key: self.kept.verdicts[key] for key in by_key if key in self.kept.verdicts}
        if verdicts:
            self.bar.advance(len(verdicts), **_cost(verdicts))
        todo = [key for key in by_key if key not in verdicts]
        # Until one is readable, verdicts are not kept: when the judge is mended, it must be asked again.
        some_are_readable, waiting = bool(verdicts), {}
        try:
            for index, verdict in self.judge.verdicts([by_key[key] for key in todo]):
                key = todo[index]
                verdicts[key] = waiting[key] = verdict
                some_are_readable = some_are_readable or self.is_readable(by_key[key], verdict)
                if some_are_readable:
                    self.kept.add(waiting)
                    waiting = {}
                elif len(waiting) >= _UNREAD_AT_FIRST:
                    raise _unreadable(waiting.values())
                self.bar.advance(1, **_cost(verdicts))
        finally:
            self.kept.flush()
        if waiting and all(v.error for v in waiting.values()):
            raise _unreadable(waiting.values())
        facts = {"verdicts": len(verdicts), "refused": sum(bool(v.error) for v in verdicts.values())}
        write_json(self.kept.directory.parent / "judging.json", self.judge.facts() | facts | _cost(verdicts))
        return verdicts


class _KeptVerdicts:
    """The verdicts in a directory. A file is there whole or not at all, and nothing is appended."""

    def __init__(self, directory: epath.Path):
        self.directory = directory
        parts = distributed.from_primary(self._read)
        self.verdicts = {key: Verdict.from_json(value) for part in parts for key, value in part.items()}
        self._index, self._part, self._changed = len(parts), {}, False
        self._interval = _SECONDS_IN_BUCKETS if on_object_store(directory) else 0.0
        self._written = -self._interval

    def add(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keeps verdicts, but no errors: what was refused is asked again the next time."""
        self._part |= {key: dataclasses.asdict(v) for key, v in verdicts.items() if not v.error}
        self._changed = True
        if time.monotonic() - self._written >= self._interval:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on the disk yet."""
        if not self._changed:
            return
        lines = "".join(json.dumps({"key": k, **v}, ensure_ascii=False) + "\n" for k, v in self._part.items())
        write_atomically(self._path(self._index), utf8(lines))
        self._written, self._changed = time.monotonic(), False
        if len(self._part) >= _PART:
            self._index, self._part = self._index + 1, {}

    def _read(self) -> list[dict[str, dict[str, Any]]]:
        """Returns the values of the verdicts of each file, by key."""
        parts = []
        while (path := self._path(len(parts))).exists():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
                parts.append({row.pop("key"): dataclasses.asdict(Verdict.from_json(row)) for row in rows})
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{path} does not hold verdicts ({error!r}); remove it to ask again") from None
        return parts

    def _path(self, index: int) -> epath.Path:
        return self.directory / f"part-{index:05d}.jsonl"


def _choice_logprobs(
    model: Model, prompts: Mapping[int, Any], choices: Sequence[str]
) -> Iterator[tuple[int, ChoiceLogprobs]]:
    requests = [Request(f"judge/{index}", prompt) for index, prompt in prompts.items()]
    if requests:
        for result in model.choice_logprobs(requests, choices):
            yield int(result.id.rpartition("/")[2]), result


def _body(question: Question) -> dict[str, Any]:
    """Returns the question as a server gets it."""
    probabilities = {"logprobs": True, "top_logprobs": 5} if question.first_token else {}
    return {
        "messages": _messages(question),
        "temperature": 0.0,
        "max_tokens": question.max_tokens,
        **probabilities,
    }


def _messages(question: Question) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in question.messages]


def _as_text(question: Question) -> str:
    """Returns the conversation as a text that goes on with one of the choices."""
    return "\n\n".join(message.content for message in question.messages) + "\n\nVerdict:"


def _verdict_of(answer: Answer) -> Verdict:
    return Verdict(
        answer.text.strip(), answer.alternatives, error=answer.error, sent=answer.sent, received=answer.received
    )


def _cost(verdicts: Mapping[str, Verdict]) -> dict[str, int]:
    sent, received = sum(v.sent for v in verdicts.values()), sum(v.received for v in verdicts.values())
    return {"tokens_sent": sent, "tokens_received": received} if sent or received else {}


def _unreadable(verdicts: Collection[Verdict]) -> UserError:
    """Returns the error for a judge of whose first verdicts none can be read."""
    last = list(verdicts)[-1]
    shown = quoted(" ".join((last.error or last.text).split())) or "an answer without text"
    advice = "" if last.error else "; a judge whose thoughts are cut needs its thinking switched off on the server"
    return UserError(
        f"--evaluate.judge: none of the first {len(verdicts)} verdicts can be read, such as '{shown}'{advice}"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
