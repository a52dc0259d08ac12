"""Where the files of tasks come from."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation import task_files
from isheep_jax.evaluation.task_files import DATA_FILES, DataFile, task_file

CONTENT = b'{"key": 1}\n'


@pytest.fixture
def server(monkeypatch, tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT)
            served.append(self.path)

        def log_message(self, *args):
            pass

    served = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(
        DATA_FILES,
        "x/y.jsonl",
        DataFile(f"http://127.0.0.1:{server.server_port}/y.jsonl", hashlib.sha256(CONTENT).hexdigest()),
    )
    yield served
    server.shutdown()


def test_file_is_downloaded_once(server):
    first, second = (task_file(EvaluateConfig(), "x/y.jsonl") for _ in range(2))
    assert first == second
    assert first.read_bytes() == CONTENT
    assert server == ["/y.jsonl"]
    assert [p.name for p in first.parent.iterdir()] == ["y.jsonl"]


def test_other_content_than_was_published_is_refused(server, monkeypatch):
    monkeypatch.setitem(DATA_FILES, "x/y.jsonl", DataFile(DATA_FILES["x/y.jsonl"].url, "0" * 64))
    with pytest.raises(UserError, match="is not the file that was published"):
        task_file(EvaluateConfig(), "x/y.jsonl")
    assert not (task_files.cache_directory() / "x" / "y.jsonl").exists()


def test_failed_download_names_url_and_way_out(server, monkeypatch):
    monkeypatch.setitem(DATA_FILES, "x/y.jsonl", DataFile("http://127.0.0.1:1/y.jsonl"))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1/y\.jsonl .*x/y\.jsonl .*--evaluate.task_data"):
        task_file(EvaluateConfig(), "x/y.jsonl")


def test_local_copy_is_used_where_it_is_named(server, tmp_path):
    path = tmp_path / "local" / "x" / "y.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    settings = EvaluateConfig(task_data=str(tmp_path / "local"))
    assert task_file(settings, "x/y.jsonl").read_bytes() == b"mine"
    assert server == []
    path.unlink()
    with pytest.raises(
        UserError, match=r"--evaluate.task_data: .*x/y\.jsonl is missing; put there what is published at http"
    ):
        task_file(settings, "x/y.jsonl")
