"""A client of OpenAI-compatible servers: chat completions over HTTP, with retries, several at a time.

Judges of the loop and of the evaluation tasks use it. Nothing here writes files, and the API key is in no message.
"""

import contextlib
import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from isheep_jax.errors import UserError

# Status codes worth another attempt; of those, the ones that tell to come back later; and the ones that concern one
# question, such as a prompt that is too long.
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_BUSY = {408, 425, 429, 503, 529}
_REFUSED = {400, 413, 422}
# Pauses between attempts, the longest one that a server may ask for, and the time for one answer (seconds).
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST_PAUSE = 60.0
TIMEOUT = 120.0
# Attempts after answers that are no chat completions: a gateway may send an error page, another program always does.
_MALFORMED_ATTEMPTS = 3

# The body of a chat completion without the model's name: "messages", "temperature", "max_tokens", ...
Question = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A server's answer to a question.

    finish_reason: "stop", "length" or "error" (the server refuses this question; `error` says why in one line).
    alternatives: for each token of the answer, the most probable tokens with their natural logprobs; empty unless the
        question has "logprobs" and the server gives them.
    sent, received: tokens of the question and of the answer as the server counts them; 0 if it does not say.
    """

    text: str
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str = ""
    alternatives: tuple[dict[str, float], ...] = ()
    sent: int = 0
    received: int = 0


class ChatServer:
    """A model on a server. Use it in the primary process alone."""

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        *,
        concurrency: int,
        setting: str,
        timeout: float = TIMEOUT,
    ):
        """Describes the server; nothing is sent yet.

        Args:
            url: Base URL of the API, such as "http://localhost:8000/v1".
            model: Name of the model on the server.
            key_variable: Environment variable that holds the API key; if it is not set, no key is sent.
            concurrency: Concurrent requests.
            setting: Setting that names the URL, such as "assess.judge"; errors begin with it.
            timeout: Seconds that one answer may take.
        """
        self.url, self.model = url.rstrip("/"), model
        self._key_variable, self._concurrency = key_variable, concurrency
        self._setting, self._timeout = setting, timeout
        self._opener = _opener(self.url)
        # Fields that the server has shown to refuse, as names of `_CONCESSIONS`.
        self._conceded: tuple[str, ...] = ()
        self._answered = -1.0  # when the last good answer arrived

    @property
    def concessions(self) -> tuple[str, ...]:
        """The fields that are left out or sent in another form because the server refuses them."""
        return self._conceded

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yields the index of each question with its answer, in the order in which they arrive.

        A question that the server refuses, or fails at while it answers others, gets an answer with an error. Raises
        UserError when the server cannot be reached, refuses the key or gives another kind of answer; what has arrived
        until then is yielded first.
        """
        waiting: queue.SimpleQueue[tuple[int, Question]] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        given_up = threading.Event()
        for item in enumerate(questions):
            waiting.put(item)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not given_up.is_set():
                    index, question = waiting.get_nowait()
                    try:
                        arrived.put((index, self._ask(question, given_up)))
                    except BaseException as error:
                        arrived.put((index, error))
                        given_up.set()

        for _ in range(min(self._concurrency, len(questions))):
            # After an error or Ctrl-C the process ends without waiting for answers.
            threading.Thread(target=work, name="chat_server", daemon=True).start()
        try:
            for _ in questions:
                index, answer = arrived.get()
                if isinstance(answer, BaseException):
                    yield from _answers_in(arrived)
                    raise answer
                yield index, answer
        finally:
            given_up.set()

    def _ask(self, question: Question, given_up: threading.Event) -> Answer:
        conceded, failures, previous = self._conceded, 0, time.monotonic()
        while True:
            body = _concede({"model": self.model, **question}, conceded)
            attempt = time.monotonic()
            try:
                data = self._post(json.dumps(body).encode())
                answer = _parse(data)
            except _Refused as error:
                more = _refused_fields(str(error), body)
                if not more:
                    return Answer("", "error", str(error))
                conceded += more
                continue
            except _Failed as error:
                # A busy server that works off other questions is waited for.
                failures += not (error.busy and self._answered > previous)
                if failures >= (_MALFORMED_ATTEMPTS if error.malformed else len(PAUSES) + 1):
                    # A question of which others are none the worse is itself to blame.
                    if not error.busy and self._answered > (-1.0 if error.answered else previous):
                        return Answer("", "error", f"after {failures} attempts: {error}")
                    raise self._failure(error, failures) from error
                pause = PAUSES[max(failures, 1) - 1] if failures <= len(PAUSES) else PAUSES[-1]
                if given_up.wait(min(max(pause, error.pause), LONGEST_PAUSE)):
                    raise self._failure(error, failures) from error
                previous = attempt
            else:
                self._answered = time.monotonic()
                self._conceded = tuple(dict.fromkeys(self._conceded + conceded))
                return answer

    def _post(self, body: bytes) -> bytes:
        """Returns the answer to one attempt. Raises _Refused, _Failed, or UserError where no attempt helps."""
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self._key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"--{self._setting}_key: {self._key_variable} holds characters that no API key has")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        message = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(message, timeout=self._timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            what = f"{error.code} {error.reason}: {_line(_read(error))}"
            what = what.replace(key, "***") if key else what
            if error.code in _REFUSED:
                raise _Refused(what) from None
            if error.code in (401, 403):
                raise UserError(
                    f"--{self._setting}_key: {self.url} refuses the key in {self._key_variable} ({what})"
                ) from None
            if error.code not in _TRY_AGAIN:
                raise UserError(f"--{self._setting}: {self.url} answers {what}") from None
            pause = _seconds(error.headers.get("Retry-After"))
            raise _Failed(what, busy=error.code in _BUSY, answered=True, pause=pause) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failed(str(getattr(error, "reason", "") or error) or type(error).__name__) from None

    def _failure(self, error: "_Failed", attempts: int) -> UserError:
        if error.malformed:
            return UserError(f"--{self._setting}: {self.url} does not answer like an OpenAI-compatible server: {error}")
        return UserError(
            f"--{self._setting}: {self.url} does not answer, after {attempts} attempts ({error}); the same command "
            "goes on from here"
        )


class _Refused(Exception):
    """The server has refused this question."""


class _Failed(Exception):
    """An attempt has failed in a way that another one may mend.

    busy: whether the server asks to come back later; pause: after how many seconds (0: it does not say).
    answered: whether the server was reached at all. malformed: whether its answer was no chat completion.
    """

    def __init__(
        self,
        what: str,
        *,
        busy: bool = False,
        answered: bool = False,
        malformed: bool = False,
        pause: float = 0.0,
    ):
        super().__init__(what)
        self.busy, self.answered, self.malformed, self.pause = busy, answered, malformed, pause


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another host than the one that the user has named gets neither questions nor the key."""

    def redirect_request(self, *_):
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    # A proxy cannot reach this machine's own servers.
    return urllib.request.build_opener(_NoRedirects, *([urllib.request.ProxyHandler({})] if local else []))


def _parse(data: bytes) -> Answer:
    """Returns the answer in a chat completion. Raises _Failed for anything else."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        usage = answer.get("usage") or {}
        return Answer(
            _valid(str(text)),
            "length" if choice.get("finish_reason") == "length" else "stop",
            alternatives=tuple(
                _logprobs(token.get("top_logprobs") or ())
                for token in (choice.get("logprobs") or {}).get("content") or ()
            ),
            sent=int(usage.get("prompt_tokens") or 0),
            received=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _Failed(_line(data), answered=True, malformed=True) from None


def _logprobs(tokens: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    known = {_valid(token["token"]): token.get("logprob") for token in tokens}
    return {token: float(p) for token, p in known.items() if isinstance(p, int | float) and not math.isnan(p)}


def _valid(text: str) -> str:
    """Returns the text with lone surrogates, which no file can hold, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _answers_in(arrived: "queue.SimpleQueue[tuple[int, Answer | BaseException]]") -> Iterator[tuple[int, Answer]]:
    while not arrived.empty():
        index, answer = arrived.get()
        if isinstance(answer, Answer):
            yield index, answer


def _without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: {name: value for name, value in body.items() if name not in names}


def _rename_max_tokens(body: dict[str, Any]) -> dict[str, Any]:
    return {"max_completion_tokens" if name == "max_tokens" else name: value for name, value in body.items()}


def _join_system(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the body with the system's message at the beginning of the user's."""
    first, *others = body["messages"]
    if first["role"] != "system" or not others:
        return body
    user = {**others[0], "content": f"{first['content']}\n\n{others[0]['content']}"}
    return {**body, "messages": [user, *others[1:]]}


# What a server may refuse, by a word of its refusal, and the body that is sent instead. Newer models want
# max_completion_tokens, some chat templates have no system role, and some servers know fewer fields.
_CONCESSIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "max_tokens": _rename_max_tokens,
    "system": _join_system,
    "seed": _without("seed"),
    "logprobs": _without("logprobs", "top_logprobs"),
    "temperature": _without("temperature"),
    "top_p": _without("top_p"),
}


def _concede(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        body = _CONCESSIONS[name](body)
    return body


def _refused_fields(refusal: str, body: dict[str, Any]) -> tuple[str, ...]:
    """Returns the concessions that a refusal asks for and that change the body."""
    return tuple(name for name, change in _CONCESSIONS.items() if name in refusal.lower() and change(body) != body)


def _read(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _seconds(text: str | None) -> float:
    """Returns the seconds in a Retry-After header; 0 for a date."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _line(answer: bytes) -> str:
    """Returns the message of an answer on one short line."""
    text = answer.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:200]
