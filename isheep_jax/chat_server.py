"""A client of OpenAI-compatible servers: chat completions over HTTP, with retries, several at a time.

Judges of the loop and of the evaluation tasks use it. Nothing here writes files, and the API key is in no message.
"""

import contextlib
import http.client
import json
import math
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from isheep_jax.errors import UserError, quoted

# Status codes worth another attempt; of those, the ones that tell to come back later; the ones that concern one
# question, such as a prompt that is too long; and the ones that concern every question.
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_BUSY = {408, 425, 429, 503, 529}
_REFUSED = {400, 413, 422}
_DENIED = {401, 402, 407, *range(300, 400)}
# Pauses between attempts, the longest one that a server may ask for, the time for one answer and for a connection
# (seconds).
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST_PAUSE = 60.0
TIMEOUT = 120.0
_CONNECT_TIMEOUT = 10.0
# Attempts after answers that are no chat completions (a gateway may send an error page, another program always does),
# at a server that has answered nothing yet, and where that took the whole time for an answer.
_MALFORMED_ATTEMPTS = 3
_FIRST_ATTEMPTS = 3
_LATE_ATTEMPTS = 2
# Questions in a row that a server fails at, after which the server is to blame: before its first good answer, and
# later.
_FIRST_QUESTIONS = 3
_LATER_QUESTIONS = 8
# Most bytes of an answer, and the shortest key that is looked for in answers: a shorter one stands for none.
_MOST_BYTES = 16 * 2**20
_SHORTEST_KEY = 16
# Marks around what a model thinks before it answers; without its beginning, a thought ends on a line of its own.
_MARK = r"(?:think(?:ing)?|thoughts?|reasoning|seed:think)"
_THOUGHT = re.compile(rf"\s*(?:<{_MARK}>|\[THINK\]|<\|channel\|>analysis<\|message\|>)", re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</{_MARK}>|\[/THINK\]|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_UNOPENED_END = re.compile(rf"(?:\A|\n)[ \t]*</{_MARK}>", re.IGNORECASE)

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


def without_thought(text: str) -> str:
    """Returns an answer without the thought before it; "" where the thought has no end.

    A thought stands between marks such as <think> and </think>; of some models the first mark is part of the prompt.
    """
    while begin := _THOUGHT.match(text):
        end = _THOUGHT_END.search(text, begin.end())
        text = text[end.end() :] if end else ""
    end = _UNOPENED_END.search(text)
    return text[end.end() :] if end else text


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
        goes_on: bool = True,
    ):
        """Describes the server; nothing is sent yet.

        Args:
            url: Base URL of the API, such as "http://localhost:8000/v1".
            model: Name of the model on the server.
            key_variable: Environment variable that holds the API key; if it is not set, no key is sent.
            concurrency: Concurrent requests.
            setting: Setting that names the URL, such as "assess.judge"; errors begin with it.
            timeout: Seconds that one answer may take.
            goes_on: Whether what was answered is kept, so that the same command goes on after a failure.
        """
        self.url, self.model = url.rstrip("/"), model
        self._key_variable, self._concurrency = key_variable, concurrency
        self._setting, self._timeout, self._goes_on = setting, timeout, goes_on
        self._opener = _opener(self.url)
        # Fields that the server has shown to refuse, as names of `_CONCESSIONS`.
        self._conceded: tuple[str, ...] = ()
        self._answered = -1.0  # when the last good answer arrived
        self._failed_in_a_row = 0  # questions given up since then

    @property
    def concessions(self) -> tuple[str, ...]:
        """The fields that are left out or sent in another form because the server refuses them."""
        return self._conceded

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Yields the index of each question with its answer, in the order in which they arrive.

        A question that the server refuses, or fails at while it answers others, gets an answer with an error. Raises
        UserError when the server cannot be reached, refuses the key or gives another kind of answer to every question;
        what has arrived until then is yielded first.
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
                        arrived.put((index, self._ask(question, given_up, len(questions))))
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

    def _ask(self, question: Question, given_up: threading.Event, of: int = 1) -> Answer:
        """Returns the answer to a question, one of so many, after as many attempts as it takes."""
        conceded, failures, previous = self._conceded, 0, time.monotonic()
        while True:
            body = _concede({"model": self.model, **question}, conceded)
            attempt = time.monotonic()
            try:
                answer = self._parse(self._post(json.dumps(body).encode()))
            except (_Refused, _Failed) as error:
                if more := _refused_fields(error.text, body):
                    conceded += more
                    continue
                if isinstance(error, _Refused):
                    return Answer("", "error", str(error))
                # A busy server that works off other questions is waited for.
                failures += not (error.busy and self._answered > previous)
                if failures >= self._attempts(error):
                    return self._give_up(error, failures, previous, of)
                pause = PAUSES[max(failures, 1) - 1] if failures <= len(PAUSES) else PAUSES[-1]
                if given_up.wait(min(max(pause, error.pause), LONGEST_PAUSE)):
                    raise self._failure(error, failures) from error
                previous = attempt
            else:
                self._answered, self._failed_in_a_row = time.monotonic(), 0
                self._conceded = tuple(dict.fromkeys(self._conceded + conceded))
                return answer

    def _attempts(self, error: "_Failed") -> int:
        """Returns how many attempts a question gets that fail like this."""
        if error.denied:
            return 1
        if error.malformed:
            return _MALFORMED_ATTEMPTS
        if self._answered < 0 and not error.busy:
            return _LATE_ATTEMPTS if error.late else _FIRST_ATTEMPTS
        return len(PAUSES) + 1

    def _give_up(self, error: "_Failed", failures: int, previous: float, of: int) -> Answer:
        """Returns an answer with an error where the question is to blame, or raises UserError where the server is.

        previous: when the attempt before the last one began. of: how many questions there are.
        """
        most = min(_FIRST_QUESTIONS, of) if self._answered < 0 else _LATER_QUESTIONS
        self._failed_in_a_row += 1
        # What has reached the server may be too much for it; others are none the worse.
        to_blame = self._failed_in_a_row < most if error.answered else self._answered > previous
        if error.busy or error.code in _DENIED or not to_blame:
            raise self._failure(error, failures) from error
        return Answer("", "error", f"after {failures} attempts: {error}" if failures > 1 else str(error))

    @property
    def _key(self) -> str:
        key = os.environ.get(self._key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"--{self._setting}_key: {self._key_variable} holds characters that no API key has")
        return key

    def _hidden(self, text: str) -> str:
        """Returns a text of the server without the API key."""
        key = self._key
        return text.replace(key, "***") if len(key) >= _SHORTEST_KEY else text

    def _post(self, body: bytes) -> bytes:
        """Returns the answer to one attempt. Raises _Refused or _Failed."""
        headers = {"Content-Type": "application/json"}
        key = self._key
        if key:
            headers["Authorization"] = f"Bearer {key}"
        message = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(message, timeout=self._timeout) as response:
                return _read(response, self._timeout)
        except urllib.error.HTTPError as error:
            text = self._hidden(_message(_read_error(error)))
            if error.code in range(300, 400):
                text = f"{text} (moved to {self._hidden(str(error.headers.get('Location')))}; name that URL)".strip()
            what = ": ".join(filter(None, (f"{error.code} {error.reason}", _line(text))))
            what = what.replace(key, "***") if key else what
            if error.code in _REFUSED:
                raise _Refused(what, text) from None
            pause, busy = _seconds(error.headers.get("Retry-After")), error.code in _BUSY
            # Some servers fail where they should refuse.
            text = text if error.code in (500, 501) else ""
            raise _Failed(what, text, code=error.code, busy=busy, pause=pause) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", "") or error
            late = isinstance(reason, TimeoutError)
            raise _Failed(_line(str(reason)) or type(reason).__name__, late=late) from None

    def _parse(self, data: bytes) -> Answer:
        """Returns the answer in a chat completion. Raises _Failed for anything else."""
        try:
            answer = json.loads(data.decode("utf-8-sig", "replace"))
            choice = answer["choices"][0]
            text = self._hidden(_valid(_text(choice["message"].get("content"))))
            said = without_thought(text)
            usage = answer.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            return Answer(
                said,
                "length" if choice.get("finish_reason") == "length" else "stop",
                # The probabilities of a thought's first tokens say nothing about the answer.
                alternatives=_alternatives(choice) if said == text else (),
                sent=_count(usage.get("prompt_tokens")),
                received=_count(usage.get("completion_tokens")),
            )
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise _Failed(_line(self._hidden(_message(data))), code=200) from None

    def _failure(self, error: "_Failed", attempts: int) -> UserError:
        if error.code in (401, 403) and not self._key:
            return UserError(
                f"--{self._setting}_key: {self.url} asks for an API key, and the environment variable "
                f"{self._key_variable} is not set ({error})"
            )
        if error.code in (401, 403):
            return UserError(f"--{self._setting}_key: {self.url} refuses the key in {self._key_variable} ({error})")
        if error.denied:
            return UserError(f"--{self._setting}: {self.url} answers {error}")
        if error.malformed:
            message = f"--{self._setting}: {self.url} does not answer like an OpenAI-compatible server: {error}"
            return UserError(message.rstrip(" :"))
        advice = "start the server, or mend the URL" if self._answered < 0 and not error.answered else ""
        goes_on = "the same command goes on from here" if self._goes_on else "run the command again when it does"
        return UserError(
            f"--{self._setting}: {self.url} does not answer, after {attempts} attempts ({error}); "
            + "; ".join(filter(None, (advice, goes_on)))
        )


class _Refused(Exception):
    """The server has refused this question. text: its whole message."""

    def __init__(self, what: str, text: str):
        super().__init__(what)
        self.text = text


class _Failed(Exception):
    """An attempt has failed.

    text: the server's whole message, where it may be a refusal. code: HTTP status; 0: the server was not reached. busy:
    whether it asks to come back later; pause: after how many seconds (0: it does not say). late: whether the time for
    an answer was over.
    """

    def __init__(
        self,
        what: str,
        text: str = "",
        *,
        code: int = 0,
        busy: bool = False,
        late: bool = False,
        pause: float = 0.0,
    ):
        super().__init__(what)
        self.text, self.code, self.busy, self.late, self.pause = text, code, busy, late, pause

    @property
    def answered(self) -> bool:
        """Whether the server was reached at all."""
        return self.code > 0

    @property
    def malformed(self) -> bool:
        """Whether the answer was no chat completion."""
        return self.code == 200

    @property
    def denied(self) -> bool:
        """Whether another attempt of the same question would end like this one."""
        return self.answered and not self.malformed and self.code not in _TRY_AGAIN


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another host than the one that the user has named gets neither questions nor the key."""

    def redirect_request(self, *_):
        return None


class _QuickToConnect:
    """A connection that is there soon or not at all; an answer may take longer."""

    def connect(self) -> None:
        timeout, self.timeout = self.timeout, min(self.timeout, _CONNECT_TIMEOUT)
        super().connect()
        self.timeout = timeout
        self.sock.settimeout(timeout)


class _Connection(_QuickToConnect, http.client.HTTPConnection):
    pass


class _SecureConnection(_QuickToConnect, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request, context=self._context)


def _opener(url: str) -> urllib.request.OpenerDirector:
    local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    # A proxy cannot reach this machine's own servers.
    proxies = [urllib.request.ProxyHandler({})] if local else []
    return urllib.request.build_opener(_Http, _Https, _NoRedirects, *proxies)


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
    """Returns the body of an answer. Raises _Failed for one that is too long, OSError for a part or a late one."""
    data, deadline = bytearray(), time.monotonic() + timeout
    while block := response.read1(2**16):
        data += block
        if len(data) > _MOST_BYTES:
            raise _Failed(f"an answer of more than {_MOST_BYTES} bytes", code=200)
        if time.monotonic() > deadline:
            raise TimeoutError(f"no whole answer in {timeout:g} seconds")
    if response.length:
        raise OSError("the answer breaks off")
    return bytes(data)


def _text(content: Any) -> str:
    """Returns the text of a message, which may have parts: of these, the ones that are no thoughts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type", "text") in ("text", "output_text"))
    return str(content or "")


def _count(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else 0


def _alternatives(choice: Mapping[str, Any]) -> tuple[dict[str, float], ...]:
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(_logprobs(token.get("top_logprobs") or ()) for token in tokens)


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


# Words of a refusal, where they are others than the name.
_WORDS = {"system": ("system", "role", "developer instruction")}


def _concede(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    for name in names:
        body = _CONCESSIONS[name](body)
    return body


def _refused_fields(refusal: str, body: dict[str, Any]) -> tuple[str, ...]:
    """Returns the concessions that a refusal asks for and that change the body."""
    refusal = refusal.lower()
    return tuple(
        name
        for name, change in _CONCESSIONS.items()
        if any(word in refusal for word in _WORDS.get(name, (name,))) and change(body) != body
    )


def _read_error(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(2**16)
    except (OSError, http.client.HTTPException, ValueError):
        return b""


def _seconds(text: str | None) -> float:
    """Returns the seconds in a Retry-After header; 0 for a date."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _message(answer: bytes) -> str:
    """Returns the message of an error, or the whole answer where it has none."""
    text = answer[: 2**16].decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        return str(json.loads(text)["error"]["message"])
    return text


def _line(text: str) -> str:
    """Returns the beginning of a text on one short line."""
    return quoted(" ".join(text[:2000].split()), 200)
