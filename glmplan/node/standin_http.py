"""The HTTP server of a rehearsal: the paths and shapes of SGLang and vLLM, with the stand-in's answers.

The head answers everything; the other nodes have only the health that always says 200. /health needs no key, as in the
engines. It listens on the address of --host and no other.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .standin_answer import Refused, chat, complete, generate
from .standin_options import Options
from .standin_rank import plain, say

OPEN_PATHS = ("/health", "/health_generate", "/ping", "/ready")
MOST_BODY_BYTES = 64 << 20


class Server(ThreadingHTTPServer):
    """Listens as soon as it is made; raises OSError when it cannot."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, options: Options) -> None:
        self.options = options
        if ":" in options.http_host:
            self.address_family = socket.AF_INET6
        super().__init__((options.http_host, options.http_port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Health, and what is served."""
        self._answer(None)

    def do_POST(self) -> None:
        """Questions."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BODY_BYTES:
            words = f"The body has {length:,} bytes; {MOST_BODY_BYTES:,} is the limit."
            return self._send(413, {"error": {"message": words}})
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            return self._send(400, {"error": {"message": "The body is no JSON."}})
        return self._answer(body)

    def _answer(self, body: dict[str, Any] | None) -> None:
        path, options = self.path.split("?")[0].rstrip("/") or "/", self.server.options
        if path in OPEN_PATHS:
            return self._send(200, None)
        if options.node_rank > 0:
            return self._send(404, {"detail": "Not Found"})
        if not self._allowed():
            return self._send(401, {"error": "Unauthorized"})
        if body is None:
            found = _told(path, options)
            return self._send(200 if found is not None else 404, found or {"detail": "Not Found"})
        work = {"/v1/chat/completions": chat, "/v1/completions": complete, "/generate": generate}.get(path)
        if work is None:
            return self._send(404, {"detail": "Not Found"})
        if options.fault("no-answer"):
            say("", f"Rehearsal: this question gets no answer: {path}")
            threading.Event().wait()
        if (slow := options.fault("slow-answer")) is not None:
            time.sleep(slow.seconds)
        try:
            found = work(body, options)
        except (Refused, TypeError, ValueError, KeyError, AttributeError) as error:
            return self._send(400, {"object": "error", "message": str(error), "type": "BadRequestError", "code": 400})
        if body.get("stream"):
            return self._stream(found)
        return self._send(200, found)

    def _allowed(self) -> bool:
        key = self.server.options.api_key
        given = self.headers.get("Authorization", "")
        return key is None or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    def _send(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 413:
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, content: dict[str, Any]) -> None:
        """One event with the whole answer, and the end mark."""
        for choice in content.get("choices", []):
            if "message" in choice:
                choice["delta"] = choice.pop("message")
        data = f"data: {json.dumps(content)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """As uvicorn's access log."""
        plain(f'INFO:     {self.client_address[0]}:{self.client_address[1]} - "{self.requestline}" {args[1]}')


def _told(path: str, options: Options) -> dict[str, Any] | None:
    """The answers to GET."""
    if path == "/v1/models":
        model = {"id": options.model, "object": "model", "created": int(time.time()), "owned_by": options.family}
        return {"object": "list", "data": [{**model, "root": options.model, "max_model_len": options.context_tokens}]}
    if path in ("/server_info", "/get_server_info"):
        shown = {name: value for name, value in vars(options).items() if name not in ("api_key", "faults")}
        return {**shown, "rehearsal": True, "max_total_num_tokens": options.pool_tokens, "version": "rehearsal"}
    if path in ("/model_info", "/get_model_info"):
        return {"model_path": options.model, "is_generation": True}
    return {"version": "rehearsal"} if path == "/version" else None
