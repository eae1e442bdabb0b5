"""The http operation: this host only, the key from a file, deadlines, no redirects."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glmplan.node.errors import NodeError
from glmplan.node.web import http
from tests.node.host import free_port


class _Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://192.0.2.1/")
            self.end_headers()
            return
        if self.path == "/json":
            self.send_response(200)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.end_headers()
            self.wfile.write(b'{"a": [1]}')
            return
        if self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.1)
            return
        length = int(self.headers.get("Content-Length") or 0)
        text = f"{self.command} {self.path} {self.headers['Authorization']} {self.rfile.read(length).decode()}".encode()
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")
    monkeypatch.delenv("GLMPLAN_NODE", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_request_and_its_answer(url: str) -> None:
    told = http({"method": "POST", "url": f"{url}/a?b=c", "body": {"x": 1}})
    assert (told["status"], told["body"]) == (200, 'POST /a?b=c None {"x": 1}')
    assert 0 < told["elapsed_s"] < 30
    assert http({"url": f"{url}/none"})["status"] == 404
    assert http({"url": f"{url}/json"})["body"] == {"a": [1]}


def test_a_redirect_is_not_followed(url: str) -> None:
    assert http({"url": f"{url}/away"})["status"] == 302


@pytest.mark.parametrize(("text", "key"), [("k-1\n", "k-1"), ("api-key: 'it''s'\nhost: x\n", "it's"), ("api_key: k2", "k2")])
def test_the_key_comes_from_a_file_below_the_state(url: str, tmp_path: Path, text: str, key: str) -> None:
    place = tmp_path / "glmplan" / "d" / "files"
    place.mkdir(parents=True)
    (place / "key").write_text(text)
    for name in ("d/files/key", str(place / "key")):
        assert http({"url": url, "api_key_file": name})["body"] == f"GET / Bearer {key} "
    for name in ("@FILES@/key", "key"):
        assert f"Bearer {key}" in http({"url": url, "api_key_file": name, "deployment": "d"})["body"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "d/../../x", "."])
def test_a_key_file_elsewhere_is_refused(url: str, name: str) -> None:
    with pytest.raises(NodeError, match="is not below"):
        http({"url": url, "api_key_file": name})


@pytest.mark.parametrize("address", ["http://192.0.2.1/", "http://[2001:db8::1]/"])
def test_another_host_is_refused(url: str, address: str) -> None:
    with pytest.raises(NodeError, match="is not this host"):
        http({"url": address})


@pytest.mark.parametrize("address", ["https://127.0.0.1/", "file:///etc/passwd", "http://", "127.0.0.1"])
def test_other_schemes_are_refused(address: str) -> None:
    with pytest.raises(NodeError, match="is no http:// address"):
        http({"url": address})


def test_nobody_there_is_a_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(NodeError, match=f"{url} does not answer: Connection refused") as caught:
        http({"url": url})
    assert caught.value.kind == "no-answer"


def test_the_deadline_is_for_the_whole_answer(url: str) -> None:
    begin = time.monotonic()
    with pytest.raises(NodeError, match=r"did not answer within 0\.5 s") as caught:
        http({"url": f"{url}/drip", "timeout_s": 0.5})
    assert caught.value.kind == "timeout"
    assert time.monotonic() - begin < 30  # of the 60 s that it drips
