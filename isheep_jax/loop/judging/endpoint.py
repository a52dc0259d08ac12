"""A judge behind an OpenAI-compatible server."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from isheep_jax import distributed
from isheep_jax.chat_server import ChatServer
from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import UserError

# The prompts are texts to be continued; this tells a chat model to do so.
_SYSTEM = "Go on with the text where it ends. Begin with the number."
# Requests in a row that a server refuses before it is to blame.
_REFUSALS = 64


class Endpoint:
    """A `Model` on a server, which only generates text. Only the first of several processes talks to the server."""

    def __init__(self, url: str, model: str, key_variable: str, concurrency: int, seed: int, *, goes_on: bool = True):
        """Describes the server; nothing is sent yet.

        Args:
            url: Base URL of the API, such as "http://localhost:8000/v1".
            model: Name of the model on the server.
            key_variable: Environment variable that holds the API key; if it is not set, no key is sent.
            concurrency: Concurrent requests.
            seed: Seed of the run; with the id of a request it gives the seed that is sent.
            goes_on: Whether completions are kept, so that the same command goes on after a failure.
        """
        self._server = ChatServer(
            url, model, key_variable, concurrency=concurrency, setting="assess.judge", goes_on=goes_on
        )
        self._concurrency, self._seed = concurrency, seed

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> Iterator[Completion]:
        """Yields one completion per request.

        A request that the server refuses gets a completion with an error, unless it refuses all of them. Raises
        UserError when the server cannot be reached, refuses the key or gives another kind of answer, and when the limit
        of tokens ends every answer before it says anything.
        """
        step = 4 * self._concurrency
        refused = empty = 0  # refused: in a row
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            answers = distributed.from_primary(lambda part=part: self._ask_all(part, sampling))
            errors = [answer["error"] for answer in answers if answer["finish_reason"] == "error"]
            refused = refused + len(part) if len(errors) == len(part) else 0
            if refused and refused >= min(_REFUSALS, start + len(part)):
                raise UserError(f"--assess.judge: {self._server.url} refuses every request: {errors[0]}")
            empty += sum(answer["finish_reason"] == "length" and not answer["text"].strip() for answer in answers)
            if empty == start + len(part):
                raise UserError(
                    f"--assess.max_tokens: each of the first {empty} answers of {self._server.url} was cut at "
                    f"{sampling.max_tokens} tokens before it said anything; a judge that thinks first needs more of "
                    "them, or its thinking switched off on the server"
                )
            yield from (Completion(r.id, **answer) for r, answer in zip(part, answers, strict=True))

    def _ask_all(self, requests: Sequence[Request], sampling: SamplingParams) -> list[dict[str, str]]:
        """Returns text, finish_reason and error of each completion, in the order of the requests, as JSON values."""
        answers = dict(self._server.answers([self._question(request, sampling) for request in requests]))
        return [
            {"text": a.text, "finish_reason": a.finish_reason, "error": a.error} for _, a in sorted(answers.items())
        ]

    def _question(self, request: Request, sampling: SamplingParams) -> dict[str, Any]:
        return {
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": request.prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": int.from_bytes(hashlib.sha256(f"{self._seed}/{request.id}".encode()).digest()[:4], "big") >> 1,
        }
