"""A Hugging Face hub on this machine that answers what downloads ask: what a model holds, and ranges of its files."""

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0de"


class HubStandIn:
    """Repositories by name, each with the bytes of its files; those of `large` are in Git LFS.

    gated: repositories that nobody may read.
    asked: how often each file was asked for.
    trouble: called with a file's name and the number of requests for it so far, this one included; a status code that
    it returns is the answer, bytes replace what the file holds.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories, self.gated = repositories, set()
        self.large: Callable[[str], bool] = lambda name: name.endswith((".safetensors", ".gguf"))
        self.asked: Counter[str] = Counter()
        self.trouble: Callable[[str, int], int | bytes | None] = lambda name, count: None
        self.commit = COMMIT
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator["HubStandIn"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body. wanted: the header Range."""
        path = path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._describe(match[1])
        match = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{self.commit}/(.+)", path)
        files = self.repositories.get(match[1], {}) if match else {}
        if not match or match[2] not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        with self._lock:
            self.asked[match[2]] += 1
            count = self.asked[match[2]]
        data, trouble = files[match[2]], self.trouble(match[2], count)
        if isinstance(trouble, int):
            return trouble, {}, b""
        data = data if trouble is None else trouble
        begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        return 206, {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}, data[begin : end + 1]

    def _describe(self, name: str) -> tuple[int, dict[str, str], bytes]:
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        siblings = []
        for file, data in self.repositories[name].items():
            entry = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(git_blob(data)).hexdigest()}
            if self.large(file):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        return 200, {}, json.dumps({"id": name, "sha": self.commit, "siblings": siblings}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path, self.headers.get("Range"))
                self.send_response(status)
                for header in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(*header)
                self.end_headers()
                with contextlib.suppress(OSError):  # a client that was killed
                    self.wfile.write(body)

            def log_message(self, *_) -> None:
                pass

        return Handler


def git_blob(data: bytes) -> bytes:
    """Returns what git hashes of a file."""
    return f"blob {len(data)}\0".encode() + data
