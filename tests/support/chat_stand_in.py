"""A stand-in for an OpenAI-compatible server, on loopback."""

import http.server
import json
import threading
from collections import Counter


class Server(http.server.ThreadingHTTPServer):
    """Answers with what `answer(prompt, attempt)` returns: (status, body, headers).

    refuses: for tests that look at the whole request; what it returns is answered, unless it is None.
    seen: path, headers and body of each request. attempts: requests by their last message. most: at the same time.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that come at once

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.seen, self.attempts = answer, [], Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.refuses = lambda body: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.attempts[prompt] += 1
            self.server.seen.append((self.path, self.headers, body))
            attempt = self.server.attempts[prompt]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        status, answer, headers = self.server.refuses(body) or self.server.answer(prompt, attempt)
        with self.server.lock:
            self.server.now -= 1
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def says(text, finish_reason="stop", logprobs=None, **fields):
    """An answer of the stand-in: a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}
    return 200, {"choices": [choice], **fields}, {}


def fails(status, message="no", **headers):
    """An answer of the stand-in: an error."""
    return status, {"error": {"message": message}}, headers
