"""One streaming request and its time stamps: OpenAI completions, or SGLang's /generate.

Each request has a connection of its own, made before the clock starts. Chunks are server-sent events; an answer counts only
when its end mark came. Tokens are the server's counts where it reports them with every chunk (`continuous_usage_stats`:
vLLM 0.33.0 and SGLang 0.5.13.post1 and later; `meta_info.completion_tokens` of /generate) or at the end, else one a chunk.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from glmplan.bench.statistics import Answer
from glmplan.bench.stop import Stop
from glmplan.errors import UsageError
from glmplan.fleet.served import MOST_BYTES

Endpoint = Literal["completions", "generate"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "generate": "/generate"}
CONNECT_S = 10.0
LONGEST_LINE = MOST_BYTES
MALFORMED = (ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What reading a chunk of an unknown shape raises."""
MOST_WORDS = 160
"""Of a failure: enough to tell one from another."""


@dataclass(frozen=True)
class Server:
    """Where and how to ask. `usage`: what of `stream_options` the server takes; the key travels in a header only."""

    url: str
    model: str
    endpoint: Endpoint
    usage: Literal["each", "end", "none"] = "each"
    timeout_s: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def body(self, prompt: list[int] | str, tokens: int) -> bytes:
        """The request: greedy, of exactly `tokens` tokens."""
        if self.endpoint == "generate":
            sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            name = "text" if isinstance(prompt, str) else "input_ids"
            return json.dumps({name: prompt, "sampling_params": sampling, "stream": True}).encode()
        found: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        if self.usage != "none":
            found["stream_options"] = {"include_usage": True}
        if self.usage == "each":
            found["stream_options"]["continuous_usage_stats"] = True
        return json.dumps(found).encode()

    def ask(self, body: bytes, stop: Stop) -> Answer:
        """Send it and read its stream to the end; every failure is in the answer."""
        connection = _connection(self.url, self.timeout_s)
        answer = Answer(began_s=time.monotonic())
        opened: socket.socket | None = None
        try:
            connection.connect()
            opened = connection.sock
            stop.add(opened)
            opened.settimeout(self.timeout_s)
            answer.began_s = time.monotonic()
            self._exchange(connection, body, answer)
        except (OSError, http.client.HTTPException, *MALFORMED) as error:
            answer.failure = _words(error, answer, self.timeout_s) if opened is not None else _no_connection(error)
        finally:
            answer.ended_s = time.monotonic()
            answer.cut = stop.is_set and bool(answer.failure)
            if opened is not None:
                stop.remove(opened)
            connection.close()
        return answer

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes, answer: Answer) -> None:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Connection": "close"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        connection.request("POST", urlsplit(self.url).path.rstrip("/") + PATHS[self.endpoint], body, headers)
        with connection.getresponse() as response:
            answer.status = response.status
            if response.status != 200:
                answer.failure = f"HTTP {response.status}: {_error_words(response.read(MOST_BYTES))}"
                return
            self._read(response, answer)

    def _read(self, response: http.client.HTTPResponse, answer: Answer) -> None:
        chunks = 0
        while line := response.readline(LONGEST_LINE):
            now = time.monotonic()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                _settle(answer, chunks)
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError("not an object")
            if problem := _problem(event):
                answer.failure = problem
                return
            chunks = _take(event, now, chunks, answer)
        answer.failure = f"the stream ended without its end mark{_after(answer)}"


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=min(CONNECT_S, timeout_s))


def base_url(url: str) -> str:
    """The server's address without /v1; anything that is no HTTP address is refused."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(base)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"{url!r} is not the address of an HTTP server.", "Write it like http://10.0.0.1:30000.")
    return base


def _take(event: dict[str, Any], now_s: float, chunks: int, answer: Answer) -> int:
    """Read one chunk into the answer; how many chunks with tokens there were so far."""
    usage = event.get("meta_info") or event.get("usage") or {}
    told = usage.get("completion_tokens")
    answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
    cached = (usage.get("prompt_tokens_details") or usage).get("cached_tokens")
    answer.cached_tokens = cached if cached is not None else answer.cached_tokens
    brings = _brings_tokens(event)
    chunks += brings
    if isinstance(told, int):
        answer.counted_by, answer.tokens = "usage", max(answer.tokens, told)
        answer.steps_known = answer.steps_known or brings
    if not brings:
        return chunks
    before = answer.marks[-1][1] if answer.marks else 0
    count = told if isinstance(told, int) else before + 1
    if count > before:
        answer.marks.append((now_s, count))
    return chunks


def _brings_tokens(event: dict[str, Any]) -> bool:
    """Whether a chunk is of the answer; the last one of completions has only the usage."""
    if "meta_info" in event:
        return bool(event["meta_info"].get("completion_tokens"))
    choices = event.get("choices") or []
    usage = event.get("usage") or {}
    return bool(choices) and (bool(choices[0].get("text")) or bool(usage.get("completion_tokens")))


def _settle(answer: Answer, chunks: int) -> None:
    """The stream came to its end: an answer without tokens is none."""
    if answer.counted_by == "chunks":
        answer.tokens = chunks
    if not answer.tokens or not answer.marks:
        answer.failure = "the answer has no tokens"


def _problem(event: dict[str, Any]) -> str:
    """What an event says went wrong; empty for an ordinary one."""
    if event.get("error") or event.get("object") == "error":
        return f"error in the stream: {_error_words(event)}"
    reason = (event.get("meta_info") or {}).get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return f"aborted: {str(reason.get('message') or '')[:MOST_WORDS]}".rstrip(": ")
    choices = event.get("choices") or [{}]
    return "aborted" if isinstance(choices[0], dict) and choices[0].get("finish_reason") == "abort" else ""


def _error_words(answer: Any) -> str:
    """The server's own words."""
    if isinstance(answer, bytes):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = answer.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return " ".join(str(answer).split())[:MOST_WORDS] or "no reason given"


def _after(answer: Answer) -> str:
    """Kept coarse, so that equal failures are counted together."""
    return " in the middle of the answer" if answer.marks else " and without a token"


def _no_connection(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no connection: nobody answered"
    return f"no connection: {getattr(error, 'strerror', None) or error}".lower()


def _words(error: Exception, answer: Answer, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {timeout_s:g} s{_after(answer)}"
    if isinstance(error, MALFORMED):
        return f"a chunk is not of the engine's shape{_after(answer)}"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    if isinstance(error, http.client.IncompleteRead | ConnectionError):
        return f"the connection broke{_after(answer)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_WORDS]}"
