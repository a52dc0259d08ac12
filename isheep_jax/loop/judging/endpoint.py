"""A judge behind an OpenAI-compatible server: chat completions over HTTP, with retries, several at a time."""

import contextlib
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from isheep_jax import distributed
from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import UserError

# The prompts are texts to be continued; this tells a chat model to do so.
_SYSTEM = "Go on with the text where it ends. Begin with the number."
# Status codes worth another attempt, and those that concern one request, such as a prompt that is too long.
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_REFUSED = {400, 413, 422}
# Seconds that one answer may take, and pauses between attempts (seconds).
TIMEOUT = 120.0
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LONGEST_PAUSE = 60.0


class _Refused(Exception):
    """The server has refused this request."""


class Endpoint:
    """A `Model` on a server, which only generates text. Only the first of several processes talks to the server."""

    def __init__(self, url: str, model: str, key_variable: str, concurrency: int, seed: int):
        """Describes the server; nothing is sent yet.

        Args:
            url: Base URL of the API, such as "http://localhost:8000/v1".
            model: Name of the model on the server.
            key_variable: Environment variable that holds the API key; if it is not set, no key is sent.
            concurrency: Concurrent requests.
            seed: Seed of the run; with the id of a request it gives the seed that is sent.
        """
        self._url, self._model, self._key_variable = url.rstrip("/"), model, key_variable
        self._concurrency, self._seed = concurrency, seed

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        """Yields one completion per request.

        A request that the server refuses gets a completion with an error, unless it refuses all of them. Raises
        UserError when the server cannot be reached, refuses the key or gives another kind of answer.
        """
        step = 4 * self._concurrency
        refused = 0
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            answers = distributed.from_primary(lambda part=part: self._ask_all(part, sampling))
            errors = [answer["error"] for answer in answers if answer["finish_reason"] == "error"]
            refused += len(errors)
            if refused == start + len(part):
                raise UserError(f"--assess.judge: {self._url} refuses every request: {errors[0]}")
            yield from (Completion(r.id, **answer) for r, answer in zip(part, answers, strict=True))

    def _ask_all(self, requests: Sequence[Request], sampling: SamplingParams) -> list[dict[str, str]]:
        """Returns text, finish_reason and error of each completion, in the order of the requests, as JSON values."""
        given_up = threading.Event()
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            futures = [pool.submit(self._ask, request, sampling, given_up) for request in requests]
            return [future.result() for future in futures]
        finally:
            # After an error or Ctrl-C, neither answers nor further attempts are waited for.
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request, sampling: SamplingParams, given_up: threading.Event) -> dict[str, str]:
        body = {
            "model": self._model,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": request.prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": int.from_bytes(hashlib.sha256(f"{self._seed}/{request.id}".encode()).digest()[:4], "big") >> 1,
        }
        try:
            answer = self._post(json.dumps(body).encode(), given_up)
        except _Refused as error:
            return {"text": "", "finish_reason": "error", "error": str(error)}
        try:
            choice = json.loads(answer)["choices"][0]
            text = choice["message"].get("content") or ""
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"--assess.judge: {self._url} does not answer like an OpenAI-compatible server: {_line(answer)}"
            ) from error
        return {"text": str(text), "finish_reason": finish, "error": ""}

    def _post(self, body: bytes, given_up: threading.Event) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._key_variable):
            headers["Authorization"] = f"Bearer {key}"
        what = ""
        for pause in (*PAUSES, 0.0):
            try:
                message = urllib.request.Request(f"{self._url}/chat/completions", body, headers)
                with urllib.request.urlopen(message, timeout=TIMEOUT) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                what = f"{error.code} {error.reason}: {_line(_read(error))}"
                if error.code in _REFUSED:
                    raise _Refused(what) from error
                if error.code in (401, 403):
                    raise UserError(
                        f"--assess.judge_key: {self._url} refuses the key in {self._key_variable} ({what})"
                    ) from error
                if error.code not in _TRY_AGAIN:
                    raise UserError(f"--assess.judge: {self._url} answers {what}") from error
                pause = min(max(pause, _seconds(error.headers.get("Retry-After"))), LONGEST_PAUSE) if pause else 0.0
            except (OSError, http.client.HTTPException) as error:
                what = str(getattr(error, "reason", "") or error) or type(error).__name__
            if given_up.wait(pause):
                break
        raise UserError(
            f"--assess.judge: {self._url} does not answer, after {len(PAUSES) + 1} attempts ({what}); the same command "
            "goes on from here"
        )


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
    return " ".join(text.split())[:200]
