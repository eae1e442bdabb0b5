"""A real HTTP server that streams tokens at chosen times, and fails on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

WORDS_PER_TOKEN = 0.5


@dataclass
class Told:
    """When a request was read and each of its chunks was about to be sent, by `time.monotonic`."""

    read_s: float
    sent_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first chunk."""
        return self.sent_s[0] - self.read_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between chunks."""
        return [now_s - before_s for before_s, now_s in pairwise(self.sent_s)]


@dataclass
class Behaviour:
    """How the server answers. `fail` maps the number of a request (from 1) to a fault; "*" is every request.

    Faults: status:503, break (mid-stream), silent (mid-stream, until the server ends), no-end, error-event, garbage, shape,
    empty, abort. A request is open until just before its last byte is sent: whoever has that byte may ask the next one.
    """

    family: str = "vllm"
    prefill_s: float = 0.0
    token_s: float = 0.0
    tokens_per_chunk: int = 1
    usage: str = "each"
    takes_ids: bool = True
    tokenizer: bool = True
    cached: int = 0
    most_tokens: int = 10**9
    context: int | None = 131_072
    key: str | None = None
    fail: dict[int | str, str] = field(default_factory=dict)
    metrics: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    open_now: int = 0
    most_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, number: int) -> str:
        return self.fail.get(number, self.fail.get("*", ""))

    @property
    def prompts(self) -> list[Any]:
        """Everything that was asked, in order."""
        return [body.get("prompt", body.get("input_ids", body.get("text"))) for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    known: Behaviour
    told: Told
    is_open = False

    def do_GET(self) -> None:
        told = {"version": "0.5.23", "skip_tokenizer_init": not self.known.tokenizer, **self.known.info}
        found: dict[str, Any] = {
            "/v1/models": {"data": [{"id": "glm", "max_model_len": self.known.context}]},
            "/server_info": told if self.known.family == "sglang" else None,
            "/version": {"version": "0.33.0"} if self.known.family == "vllm" else None,
            "/metrics": self.known.metrics or None,
        }
        if not self._allowed():
            return self._send(401, {"error": "Unauthorized"})
        answer = found.get(self.path)
        return self._send(404, {"detail": "Not Found"}) if answer is None else self._send(200, answer)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.known.lock:
            self.known.bodies.append(body)
            self.known.keys.append(self.headers.get("Authorization"))
            self.told = Told(time.monotonic())
            self.known.told.append(self.told)
            number, self.is_open = len(self.known.bodies), True
            self.known.open_now += 1
            self.known.most_open = max(self.known.most_open, self.known.open_now)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._answer(body, self.known.fault(number))
        finally:
            self._count_out()

    def _count_out(self) -> None:
        """The request is open no more."""
        with self.known.lock:
            self.known.open_now -= self.is_open
            self.is_open = False

    def _answer(self, body: dict[str, Any], fault: str) -> None:
        self.close_connection = True
        refused = self._refusal(body, fault)
        if refused is not None:
            return self._send(*refused)
        generate = self.path == "/generate"
        prompt = body.get("input_ids") if generate else body["prompt"]
        read = len(prompt) if isinstance(prompt, list) else round(len(prompt.split()) / WORDS_PER_TOKEN)
        limit = body["sampling_params"]["max_new_tokens"] if generate else body["max_tokens"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        return self._stream(body, read, min(limit, self.known.most_tokens), fault)

    def _allowed(self) -> bool:
        return self.known.key is None or self.headers.get("Authorization") == f"Bearer {self.known.key}"

    def _refusal(self, body: dict[str, Any], fault: str) -> tuple[int, Any] | None:
        if not self._allowed():
            return 401, {"error": "Unauthorized"}
        if fault.startswith("status:"):
            return int(fault.partition(":")[2]), {"error": {"message": "the pool is full"}}
        if self.path == "/generate":
            return None if self.known.family == "sglang" else (404, {"detail": "Not Found"})
        if not self.known.tokenizer:
            return 500, {"message": "skip_tokenizer_init is set"}
        if isinstance(body["prompt"], list) and not self.known.takes_ids:
            return 400, {"message": "prompt must be a string"}
        options = body.get("stream_options") or {}
        if (self.known.usage == "none" and options) or (self.known.usage == "end" and "continuous_usage_stats" in options):
            return 422, {"message": "extra fields not permitted: stream_options"}
        return None

    def _stream(self, body: dict[str, Any], read: int, tokens: int, fault: str) -> None:
        time.sleep(self.known.prefill_s)
        done, options = 0, body.get("stream_options") or {}
        while done < tokens and fault != "empty":
            done = min(tokens, done + self.known.tokens_per_chunk)
            usage = {"prompt_tokens": read, "completion_tokens": done}
            usage["prompt_tokens_details"] = {"cached_tokens": self.known.cached}  # type: ignore[assignment]
            self.told.sent_s.append(time.monotonic())
            self._event(self._chunk(usage if options.get("continuous_usage_stats") else None, read, done))
            if fault and done >= tokens // 2 and not self._goes_on(fault):
                return
            if done < tokens:
                time.sleep(self.known.token_s * self.known.tokens_per_chunk)
        if options:
            self._event({"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": done}})
        self._count_out()
        if fault != "no-end":
            self._write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, usage: dict[str, Any] | None, read: int, done: int) -> dict[str, Any]:
        if self.path == "/generate":
            meta = {
                "prompt_tokens": read,
                "completion_tokens": done,
                "cached_tokens": self.known.cached,
                "finish_reason": None,
            }
            return {"output_ids": [7], "meta_info": meta}
        found: dict[str, Any] = {"choices": [{"index": 0, "text": " word", "finish_reason": None}]}
        return found | ({"usage": usage} if usage else {})

    def _goes_on(self, fault: str) -> bool:
        """Fail in the middle of the stream."""
        if fault in ("no-end", "empty"):
            return True
        self._count_out()
        if fault == "error-event":
            self._event({"error": {"message": "CUDA out of memory", "code": 500}})
        elif fault == "abort":
            self._event(
                {"meta_info": {"completion_tokens": 1, "finish_reason": {"type": "abort", "message": "the queue is full"}}}
            )
        elif fault == "garbage":
            self._write(b"data: {half\n\n")
        elif fault == "shape":
            self._event({"choices": ["word"], "usage": 3})
        elif fault == "silent":
            self.known.ended.wait(60)
        else:
            assert fault == "break", fault
        return False

    def _event(self, content: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(content)}\n\n".encode())

    def _write(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, status: int, content: Any) -> None:
        self._count_out()
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        return


@contextmanager
def streaming(behaviour: Behaviour | None = None) -> Iterator[tuple[str, Behaviour]]:
    """The server on a free port: its address and what it was asked."""
    known = behaviour or Behaviour()
    server = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"known": known}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", known
    finally:
        known.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
